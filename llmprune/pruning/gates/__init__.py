"""Learned L0 gates: their mathematics, and how a model computes with them."""
