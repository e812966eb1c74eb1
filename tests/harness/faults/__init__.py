"""Faults that jobs are put through, and what must come out all the same."""
