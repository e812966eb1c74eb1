"""Scores of the importance of each block and each unit of a model, by all published criteria."""
