"""All criteria that llmprune brings along: importing this module registers them."""

from llmprune.pruning.scoring import baselines as orders
from llmprune.pruning.scoring import hidden_states as states
from llmprune.pruning.scoring import removals, units, weights
from llmprune.pruning.scoring.criterion import CRITERIA

__all__ = ["CRITERIA", "orders", "removals", "states", "units", "weights"]
