"""Build a Composer trainer from a config."""
