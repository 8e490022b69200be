"""The runtime on NVIDIA devices, over libcuda alone; `targets.py` beside this folder is the one that opens it."""
