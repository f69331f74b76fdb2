"""Input as nobody would write it: seeded mutations of settings, command lines, data, models and runs."""
