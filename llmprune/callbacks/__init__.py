"""Composer callbacks, one per file; and the logger that writes metrics.jsonl."""
