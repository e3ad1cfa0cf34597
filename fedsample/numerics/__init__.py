"""Shared numerics: sums in a fixed order, warm-up of the maths library, dtypes by name."""
