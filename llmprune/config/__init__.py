"""The YAML of a job: its schema, how it is read, and the settings of optimisers and sharding."""
