"""Measuring, drawing and documenting this milestone, from outside of its engine."""
