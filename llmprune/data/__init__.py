"""Prepared data: its format, its order, and the streams that training reads."""
