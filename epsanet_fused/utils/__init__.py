"""Helpers that know nothing of PSA."""
