"""Flower apps on devices: a carrier over our streams, its host and its node."""
