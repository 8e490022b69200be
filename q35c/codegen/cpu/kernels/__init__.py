"""Kernel families: each file turns a static shape, precision and instruction set into TIR functions."""

from q35c.codegen.cpu.kernels.fast_parser import install

install()
