"""Make or load a model, and name its weights."""
