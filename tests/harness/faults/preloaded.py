"""What every attempt needs, imported once for all of them."""

import llmprune.convert.commands
import llmprune.jobs.iterate
import llmprune.training.trainer  # noqa: F401
