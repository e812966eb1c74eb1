"""Replacement modules for spans of blocks, and their training."""
