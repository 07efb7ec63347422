"""The tasks of the coding round: each file states one, and holds one way to write it."""
