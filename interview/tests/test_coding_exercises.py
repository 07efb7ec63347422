"""The coding round as exercises: a blank body fails its hidden tests, the solutions pass, planted bugs are noticed."""
from __future__ import annotations

from m0_basics.tools.testing.exercises import ExerciseConformance


class TestCodingRound(ExerciseConformance):
    package = "interview"
    # It is about a milestone's `llm`, which this folder has not.
    test_no_module_is_imported_before_the_overlay = None
