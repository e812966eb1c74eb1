"""Entry point of ``python -m llmprune.cli``."""

from llmprune.cli import main

main()
