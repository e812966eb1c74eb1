"""From checkpoints and plans to Hugging Face folders."""
