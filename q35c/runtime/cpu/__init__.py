"""The runtime on host threads and host memory; `targets.py` beside this folder is the one that opens it."""
