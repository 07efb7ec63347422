"""Exercises: a milestone's central functions, blanked out, written by the learner, graded by its tests."""
from .commands import exercise_app

__all__ = ["exercise_app"]
