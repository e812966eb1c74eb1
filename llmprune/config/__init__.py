"""The YAML of a job: its schema, how it is read, and the settings that belong to the trainer alone."""
