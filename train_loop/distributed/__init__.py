"""Processes: launching them, agreeing among them, noticing when one is lost."""
