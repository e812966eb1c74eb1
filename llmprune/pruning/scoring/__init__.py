"""How much each block and each unit of a model matters, by every published criterion."""
