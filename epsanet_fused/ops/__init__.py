"""The operators: schema, checks, fake kernels and autograd."""
