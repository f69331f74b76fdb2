"""Every random number of a run comes from a generator keyed by what it is for: nothing depends on what ran before.

So dropout masks can be drawn again for any micro-batch of any step, on any process, and a sample does not depend on
the samples before it.
"""

import numpy as np
import torch


def key(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose and its numbers, e.g. key("dropout", seed, step, micro_batch).

    The numbers are hashed together, not added: (seed 0, step 2) and (seed 1, step 1) have nothing in common.
    """
    words = [int.from_bytes(purpose.encode(), "little"), *numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_torch(purpose: str, *numbers: int) -> None:
    """Key torch's default generators, on the CPU and on every accelerator."""
    torch.manual_seed(key(purpose, *numbers))
