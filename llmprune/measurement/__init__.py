"""Measurement of the speed and size of models."""
