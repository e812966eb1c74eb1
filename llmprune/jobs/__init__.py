"""Jobs that a YAML describes (``llmprune/config/jobs.py`` has the table), and functions that several jobs use."""
