"""Accuracy against the float64 oracle, and the self-check."""
