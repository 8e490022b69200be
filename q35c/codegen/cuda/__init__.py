"""The backend of NVIDIA devices: kernels as CUDA text through TVM, programs as launch tables."""
