"""Diagnostics: convergence of chains, calibration of predictions, moments predicted by theory."""
