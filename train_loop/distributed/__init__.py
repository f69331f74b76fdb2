"""Processes: how they are launched, how they agree, and how they notice that one is lost."""
