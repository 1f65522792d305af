"""Detection, verification and replacement of other implementations of the PSA module."""
