"""From scores to what stays: which blocks, which units, and what can be made up for."""
