"""Predictions from theory, in plain numpy: stationary moments of samplers over compressed links."""
