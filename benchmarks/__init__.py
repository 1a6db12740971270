"""What `make bench` runs: the kernels beside PyTorch and JAX."""
