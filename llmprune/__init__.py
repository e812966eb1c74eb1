"""Prune large language models and train them back."""
