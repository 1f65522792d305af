"""The backends that run the operators, and the choice among them."""
