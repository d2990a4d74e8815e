"""Self-supervised systems on real images, built on the public names of `hypergrad`."""
