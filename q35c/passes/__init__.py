"""Graph passes: pure functions `Graph -> Graph`, one per file, listed in `pipeline.py`."""
