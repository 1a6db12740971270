"""Benchmarks of the kernels beside PyTorch and JAX: `make bench`."""
