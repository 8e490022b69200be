"""Code generation for host processors: kernels, programs, instruction sets, building."""
