"""The ways to run the operators, and which one runs."""
