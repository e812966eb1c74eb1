"""Composer callbacks: what can happen during training, one to a file; and the logger of metrics.jsonl."""
