"""Kernels over whole rows: norms, rotary tables, rounding."""
