"""Flower apps on devices: a carrier over gRPC streams, the server's side and the device's side."""
