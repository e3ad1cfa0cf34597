"""Where clients run: vectorised in this process, or behind Flower's runtime."""
