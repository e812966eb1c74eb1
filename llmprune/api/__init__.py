"""The functions of ``import llmprune``, with the names and defaults of the commands."""
