"""Replacement modules for spans of blocks, and how they learn."""
