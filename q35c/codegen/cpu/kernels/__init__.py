"""Kernel families: each file turns a static shape, precision and instruction set into TIR functions."""
