"""Conversion of checkpoints and plans to Hugging Face folders, quantisation, and comparison of two models."""
