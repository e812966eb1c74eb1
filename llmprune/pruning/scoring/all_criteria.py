"""All criteria in llmprune; importing this module registers them."""

from llmprune.pruning.scoring import baselines, hidden_states, removals, units, weights
from llmprune.pruning.scoring.criterion import CRITERIA

__all__ = ["CRITERIA", "baselines", "hidden_states", "removals", "units", "weights"]
