"""From a config to a Composer trainer."""
