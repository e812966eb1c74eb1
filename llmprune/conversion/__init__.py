"""From checkpoints and plans to Hugging Face folders; quantising; whether two models compute the same."""
