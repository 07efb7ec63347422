"""What measures, draws and documents this milestone from outside. No file of the engine imports it."""
