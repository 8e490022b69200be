"""Mixtures of experts: routing, and the chosen experts' products."""
