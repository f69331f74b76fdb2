"""What is watched: the metrics log. The loop calls it; it never changes what the loop computes."""
