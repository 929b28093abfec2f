"""Rules: each a function of tensors, in a file of its own, and a line in `RULES`."""
