"""The product's verbs: Composer callbacks, one to a file."""
