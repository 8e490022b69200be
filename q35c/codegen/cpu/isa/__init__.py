"""Instruction sets that kernels are generated for."""
