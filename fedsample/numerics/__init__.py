"""Numerics that every room stands on: sums in a fixed order, code paths chosen once, dtypes by name."""
