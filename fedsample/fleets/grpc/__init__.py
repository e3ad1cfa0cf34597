"""Real devices: one long-lived gRPC stream each, with mutual TLS; see docs/devices/.

The package is on the path of a device, which installs torch, grpcio and little else: nothing here imports flwr.
"""
