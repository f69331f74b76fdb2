"""All settings of a run: what they are, how they are read from YAML and the command line, and how they are checked."""
