"""Diagnostics measured on draws: convergence of chains, calibration of predictions.

Predictions from theory are in `fedsample.theory`.
"""
