"""Quantised matrices from files and into them: GGUF's blocks, and the folders of AutoGPTQ and GPTQModel."""
