"""What is measured about a run: its truth sheet, statistics of steps, probes, replays of any step."""
