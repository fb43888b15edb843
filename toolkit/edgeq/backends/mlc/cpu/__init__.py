"""A processor's own kernels: matrices in tiles, activations in 8 bits, keys and values in one piece."""
