"""The parts of a step's time, as metrics.jsonl and the report name them. A leaf, since the report has no torch."""

STEP_PARTS = ("data", "forward", "backward", "communication", "waiting", "optimizer")
