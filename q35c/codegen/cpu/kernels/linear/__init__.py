"""Linear layers, and the embedding that reads the same weights."""
