"""Durable checkpoints: the files on disk, the manager beside training, reading them back, and a run's folder."""
