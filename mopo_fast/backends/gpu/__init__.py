"""Backends for GPUs: Triton and CUDA."""
