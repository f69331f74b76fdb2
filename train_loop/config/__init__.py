"""Every setting of a run: the schema, reading it from YAML and the command line, checking it."""
