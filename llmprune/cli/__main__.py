"""``python -m llmprune.cli``."""

from llmprune.cli import main

main()
