"""All criteria that llmprune brings along: importing this module registers them."""

from llmprune.scoring import orders, removals, states, units, weights
from llmprune.scoring.criterion import CRITERIA

__all__ = ["CRITERIA", "orders", "removals", "states", "units", "weights"]
