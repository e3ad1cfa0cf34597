"""Clients behind Flower's own runtime: a fleet over a Grid, its roster, its simulation."""
