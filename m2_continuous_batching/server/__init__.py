"""An OpenAI-compatible HTTP server over any milestone's engine, from this one on."""
