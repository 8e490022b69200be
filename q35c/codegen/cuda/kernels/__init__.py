"""Kernel families of the CUDA backend, simple shapes of blocks first."""
