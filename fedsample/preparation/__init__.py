"""Preparation before the first round: the mode, the metric, the curvature, the step, and where chains start."""
