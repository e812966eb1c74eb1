"""What can be run from a YAML (the table is in ``llmprune/config/jobs.py``), and what such jobs share."""
