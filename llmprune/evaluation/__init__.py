"""How good a model is: losses, perplexity, tasks, continuations, stability."""
