"""The race of all milestones: `python -m m0_basics.tools.race`, or `make demo`."""
