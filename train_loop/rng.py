"""Every random number of a run comes from a generator that is keyed by its purpose. Nothing depends on what ran before.

So dropout masks can be drawn again for any micro-batch of any step, on any process, and a sample does not depend on
earlier samples.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # data is prepared without torch
    import torch


def key(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose and its numbers, such as "dropout", seed, step and micro-batch.

    The numbers are hashed together, not added: (seed 0, step 2) and (seed 1, step 1) have nothing in common.
    """
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(purpose: str, *numbers: int) -> float:
    """A number in [0, 1) with 53 random bits, for one purpose and its numbers; see `key`."""
    return (key(purpose, *numbers) >> 10) / 2**53


def seed_torch(device: "torch.device", purpose: str, *numbers: int) -> None:
    """Seed torch's default generators for the CPU and for a device.

    `torch.manual_seed` would seed every kind of accelerator. For each kind that is not in use, it records the call
    stack every time, which costs as much as a small step.
    """
    import torch

    seed = key(purpose, *numbers)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
