"""Deciding what of a model can go: scores, gates, replacement modules, budgets; each ends in a plan."""
