"""Stand-ins for spans of blocks, and how they learn."""
