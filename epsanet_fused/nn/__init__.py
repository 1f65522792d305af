"""PyTorch modules and networks built on the operators."""
