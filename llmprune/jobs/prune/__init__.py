"""The whole way from a model to a smaller one: data, scores, plan, cut, recovery, evaluation, speed and report."""
