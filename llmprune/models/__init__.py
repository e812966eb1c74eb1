"""Opening Hugging Face models and wrapping them for Composer."""
