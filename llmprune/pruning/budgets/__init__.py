"""Shapes under a budget: the costs of a shape, and the choice of the shape with the lowest loss."""
