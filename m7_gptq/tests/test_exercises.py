"""Every exercise of this milestone can be blanked, and is graded."""
from __future__ import annotations

from m0_basics.tools.testing.exercises import ExerciseConformance


class TestExercises(ExerciseConformance):
    package = "m7_gptq"
