"""Shapes under a budget: what a shape costs, and which of those that fit keeps most."""
