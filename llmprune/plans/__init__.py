"""The plan, which says what of a model stays, and the surgery that carries it out."""
