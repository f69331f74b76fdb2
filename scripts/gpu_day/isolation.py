"""Part "isolation": packed documents under each attention that is there, against one document at a time.

    row 0   d0 d0 d0 d0 d0 d1 d1 d1 ...        positions  0 1 2 3 4 0 1 2 ...
    row 1   d4 d4 d5 d5 d5 d5 ...                         0 1 0 1 2 3 ...

The packed rows go through `Objective` as in training; each document alone is a row of its own, without positions.
"""

import itertools
from pathlib import Path
from typing import Any

import torch

from gpu_day.models import ATTENTIONS, FAMILIES, changed, device, quiet, relative, tiny, tokens
from gpu_day.rows import Finding, Rows, Skipped, at_most, holds, part

_DOCUMENTS = ((17, 30, 2, 15), (1, 40, 23))  # tokens of each, row by row
_LENGTH = 64
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FLEX_SECONDS = 8
# Relative, of a document's nll. In fp32: sums of a hundred terms in another order. In bf16 a logit is off by some 2^-8
# of itself, and the shortest document has one target.
_LIMITS = {"fp32": 1e-5, "bf16": 1e-2}


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """Sums of nll, logits and gradients, for each attention and kind of number."""
    quiet()
    for attention, family, (name, dtype) in itertools.product(ATTENTIONS, FAMILIES, _DTYPES.items()):
        if attention == "flex_attention" and family != "llama":
            continue  # it is compiled for each kind of number and length, which takes seconds: one family is enough
        case, seconds = f"{attention}, {family}, {name}", _FLEX_SECONDS if attention == "flex_attention" else 0
        try:
            objective = _objective(family, attention, dtype)
        except Skipped as reason:
            rows.add(case, Finding(None, "skipped", why=str(reason)))
            continue
        rows.check(f"none sees another, {case}", none_sees_another, objective, seconds=seconds)
        rows.check(f"one at a time, {case}", one_at_a_time, objective, _LIMITS[name], seconds=seconds)
        rows.check(f"no gradient reaches another, {case}", no_gradient_reaches_another, objective, seconds=seconds)


def _objective(family: str, attention: str, dtype: torch.dtype) -> Any:
    from train_loop.training.objective import Objective

    return Objective(tiny(family, attention, dtype))


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and positions [rows, length] of the documents; a document's last token has no target."""
    from train_loop.data.loader import IGNORED

    inputs = tokens(len(_DOCUMENTS), _LENGTH)
    targets = inputs.roll(-1, 1)
    positions = torch.empty_like(inputs)
    for row, first, last in documents():
        positions[row, first:last] = torch.arange(last - first, device=device())
        targets[row, last - 1] = IGNORED
    return inputs, targets, positions


def documents() -> list[tuple[int, int, int]]:
    """Row, first column and the one behind the last, of each document."""
    return [
        (row, last - length, last)
        for row, lengths in enumerate(_DOCUMENTS)
        for length, last in zip(lengths, itertools.accumulate(lengths), strict=True)
    ]


@torch.no_grad()
def one_at_a_time(objective: Any, limit: float) -> Finding:
    """Each document's nll in the packed rows is that of the document alone."""
    from train_loop.data.loader import IGNORED

    inputs, targets, positions = packed()
    together, alone, leaking = [], [], []
    for row, first, last in documents():
        if last - first == 1:  # of one token, nothing is predicted
            continue
        only = torch.full_like(targets, IGNORED)
        only[row, first:last] = targets[row, first:last]
        together.append(float(objective(inputs, only, positions)))
        leaking.append(float(objective(inputs, only)))
        alone.append(float(objective(inputs[row : row + 1, first:last], targets[row : row + 1, first:last])))
    leak = relative(leaking, alone)
    if not leak > 3 * limit:
        raise AssertionError(f"without positions the nll is off by {leak:.1g} only: this check would see nothing")
    return at_most(relative(together, alone), limit, why=f"{len(alone)} documents; without positions {leak:.2g}")


def _logits(objective: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[rows, length, vocabulary], as the packed rows' objective computes them."""
    _, targets, positions = packed()
    seen: list[torch.Tensor] = []
    objective(inputs, targets, positions, visit=lambda logits, target: seen.append(logits.clone()))
    return torch.cat(seen).view(*inputs.shape, -1)


@torch.no_grad()
def none_sees_another(objective: Any) -> Finding:
    """A document is changed, each in turn: its own logits change, all others keep their bits."""
    inputs, _, _ = packed()
    before, crossed = _logits(objective, inputs), []
    for row, first, last in documents():
        other = inputs.clone()
        other[row, first:last] = changed(other[row, first:last])
        after = _logits(objective, other)
        if torch.equal(before[row, first:last], after[row, first:last]):
            raise AssertionError("changing a document does not change its logits: this check would see nothing")
        before_rest, after_rest = before.clone(), after.clone()
        before_rest[row, first:last] = after_rest[row, first:last] = 0
        if not torch.equal(before_rest, after_rest):
            crossed.append(f"row {row}, tokens {first} to {last - 1}")
    count = len(documents())
    return holds(not crossed, f"{count - len(crossed)} of {count}", "all other logits bit-equal", "; ".join(crossed))


def no_gradient_reaches_another(objective: Any) -> Finding:
    """The nll of one row's second document has no gradient at another's tokens, forwards or backwards of it."""
    inputs, targets, positions = packed()
    _, first, last = documents()[1]
    from train_loop.data.loader import IGNORED

    only = torch.full_like(targets, IGNORED)
    only[0, first:last] = targets[0, first:last]
    seen: list[torch.Tensor] = []

    def watch(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        seen.append(output)
        return output

    handle = objective.model.get_input_embeddings().register_forward_hook(watch)
    try:
        objective.train()
        objective(inputs, only, positions).backward()
    finally:
        handle.remove()
        objective.eval()
        objective.zero_grad()
    gradient = seen[0].grad
    assert gradient is not None
    strength = gradient.view(*inputs.shape, -1).abs().amax(-1)
    inside = float(strength[0, first:last].max())
    strength[0, first:last] = 0
    if not inside > 0:
        raise AssertionError("the document's own tokens have no gradient: this check would see nothing")
    return holds(not strength.any(), float(strength.max()), "0 elsewhere", f"{inside:.2g} inside")


if __name__ == "__main__":
    part(checks)
