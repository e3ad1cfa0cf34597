"""Clients on real devices, over gRPC with mutual TLS."""
