"""What a run records while it trains: metrics.jsonl, trackers, throughput."""
