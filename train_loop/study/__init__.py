"""What is watched: truth sheet and metrics log. The loop calls them; they never change what it computes."""
