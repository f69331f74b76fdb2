"""GPU day: what can only be found out on a GPU, in eight minutes, with the Python that is there; see `day.py`."""
