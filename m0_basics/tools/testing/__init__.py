"""What every milestone's tests share: tiny models, references to compare with, and one behaviour suite.

Only tests import this package; nothing outside it needs pytest or transformers.
"""
