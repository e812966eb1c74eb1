"""The selection of blocks and units that stay, from scores, and the correction of what remains."""
