"""The float64 oracle, the rule of accuracy, and a self-check of the backends."""
