"""EPSANet in other packages' interfaces. Nothing here is imported unless a user asks for it."""
