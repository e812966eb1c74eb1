"""What can be run from a YAML, one file for each job."""
