"""What run.mixed_precision means: the only table of it."""

from typing import NamedTuple


class Precision(NamedTuple):
    """A precision of the forward and backward passes."""

    dtype: str  # torch's name for the type that they compute in
    same_loss: float  # relative difference between two ways to compute a loss that rounding can explain
    same_logit: float  # the same for a logit, as an absolute difference


PRECISIONS = {
    "no": Precision("float32", 1e-5, 1e-3),
    "bf16": Precision("bfloat16", 2e-2, 0.5),
    "fp16": Precision("float16", 2e-3, 0.1),
    "fp8": Precision("bfloat16", 5e-2, 1.0),
}
