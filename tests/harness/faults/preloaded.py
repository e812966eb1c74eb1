"""What every attempt needs, imported once for all of them."""

import llmprune.conversion.commands
import llmprune.jobs.iterate
import llmprune.training.trainer  # noqa: F401
