"""Where clients run: vectorised in this process, behind Flower's runtime, or on devices over gRPC."""
