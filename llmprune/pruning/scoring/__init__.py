"""How much each block of a model matters, by every published criterion, and which blocks go."""
