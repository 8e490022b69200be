"""Products of rows and packed weights, tile by tile, for the families that multiply."""
