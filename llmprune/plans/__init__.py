"""The plan, which describes what of a model stays, and the surgery that applies it."""
