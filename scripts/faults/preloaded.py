"""What every attempt needs, imported once for all of them."""

import llmprune.convert.commands
import llmprune.iteration
import llmprune.training  # noqa: F401
