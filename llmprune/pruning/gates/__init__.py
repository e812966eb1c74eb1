"""Learned L0 gates: their mathematics, and models that compute with them."""
