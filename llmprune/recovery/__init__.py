"""Training back what pruning cost: which weights train, adapters, a teacher."""
