"""The modules and the networks."""
