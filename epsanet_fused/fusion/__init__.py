"""Other people's PSA modules: found, verified and replaced."""
