"""How good a model is, and whether two are the same."""
