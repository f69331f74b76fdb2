"""The parts of a step's time, as named in metrics.jsonl and the report. A leaf, because the report imports no torch."""

STEP_PARTS = ("data", "forward", "backward", "communication", "waiting", "optimizer")
