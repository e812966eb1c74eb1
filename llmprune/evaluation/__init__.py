"""Measurements of a model's quality: losses, perplexity, tasks, continuations, stability."""
