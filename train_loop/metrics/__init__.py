"""What a run writes down while it trains: metrics.jsonl, trackers, throughput."""
