"""What measures, draws, documents and teaches the lab from outside. No file of an engine imports it."""
