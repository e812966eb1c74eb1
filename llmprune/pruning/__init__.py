"""Methods that decide what to remove from a model: scores, gates, replacement modules, budgets; each makes a plan."""
