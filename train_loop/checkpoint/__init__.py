"""Durable checkpoints: the files on disk, writing them during training, reading them back, and a run's folder."""
