"""Matrix products on a CPU: which library computes them, and the proof that it computes them right.

torch multiplies by MKL (on ARM by OpenBLAS) and brings oneDNN along, and numpy brings OpenBLAS. Which one is fastest
depends on the processor and on what the product is for:

    forward       x W^T + b          to_weights    G^T x
    to_inputs     G W                add           what is there + G^T x

`_TABLE` has the fastest for the processors that were measured; on all others, torch multiplies as it always does.
`scripts/bench/products.py` measures every library, and says where the table is wrong. Nothing is timed when a run
starts, so the same command computes the same bits. A library must have multiplied a few matrices right before it is
used (`proven`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl
import torch
import torch.nn.functional as F
from torch import library

from train_loop import devices, environment
from train_loop.errors import TrainingError

TORCH, ONEDNN, OPENBLAS = LIBRARIES = "torch", "onednn", "openblas"
_BLOCK = 8192  # rows of a result that are added to what is there at a time
_ROUNDING = 2.0**-24  # of a float32


class Choice(NamedTuple):
    """The library for each role; results of `to_weights` that are wider than tall have their own."""

    forward: str
    to_inputs: str
    to_weights: str
    to_wide_weights: str
    add: str


def by_one(library: str) -> Choice:
    """A library for all roles."""
    return Choice(library, library, library, library, library)


_TORCH_ALONE = by_one(TORCH)
# By the processor's maker and torch's name for what it can do. Billions of operations a second of MKL, oneDNN and
# OpenBLAS, in the layers of DistilGPT2 on two cores, are beside them; docs/speed.md has the whole tables.
_TABLE = {
    ("GenuineIntel", "AVX512"): _TORCH_ALONE,  # 300, 108 to 280, 240
    ("GenuineIntel", "AVX2"): _TORCH_ALONE,  # 175, 32 to 185, 185: as a newer processor that was told to do without
    ("AuthenticAMD", "AVX512"): Choice(ONEDNN, ONEDNN, TORCH, ONEDNN, TORCH),  # MKL does without AVX-512 here
    ("AuthenticAMD", "AVX2"): by_one(OPENBLAS),  # 80 to 128, 50 to 133, 130 to 140
}
_WITHOUT_OPENBLAS = {("AuthenticAMD", "AVX2"): Choice(ONEDNN, TORCH, TORCH, TORCH, TORCH)}


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for x [..., in], W [out, in], b [out], all fp32 on the CPU, without gradients."""
    library = choice().forward
    if library == TORCH or not x.numel():
        return F.linear(x, weight, bias)
    if library == ONEDNN:
        return _by_onednn(x, weight, bias)
    return torch.ops.train_loop.openblas_linear(x, weight, bias)


def _openblas_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output = _by_openblas(x.flatten(0, -2), weight.t())
    if bias is not None:
        output += bias
    return output.view(*x.shape[:-1], -1)


# An operator, so that whatever keeps the results of matrix products sees this one, too.
OPERATOR = "train_loop::openblas_linear"
_operators = library.Library("train_loop", "FRAGMENT")
_operators.define("openblas_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_operators.impl("openblas_linear", _openblas_linear, "CPU")


def to_inputs(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """G W for a gradient G [..., out] and W [out, in]."""
    product = _MULTIPLY[choice().to_inputs](gradient.flatten(0, -2), weight)
    return product.view(*gradient.shape[:-1], weight.shape[1])


def to_weights(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A^T B for A [rows, m], B [rows, n]: a weight's gradient, of those to its outputs and of its inputs."""
    chosen = choice()
    return _MULTIPLY[chosen.to_wide_weights if b.shape[1] > a.shape[1] else chosen.to_weights](a.t(), b)


def add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add A^T B to a total [m, n], in place, for A [rows, m], B [rows, n]."""
    _ADD[choice().add](total, a.t(), b)


def add_rounded(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A total in fp32 [m, n], or nothing yet, and A^T B for A [rows, m], B [rows, n] in 16 bits on the CPU."""
    if total is None:
        return (a.t() @ b).float()
    for first in range(0, len(total), _BLOCK):  # so few that they stay in the cache until they are added
        total[first : first + _BLOCK] += (a[:, first : first + _BLOCK].t() @ b).float()
    return total


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_openblas(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A B by numpy, on the tensors' own memory."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
    return out


def _add_by_onednn(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total += _MULTIPLY[ONEDNN](a, b)


def _add_by_openblas(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    scratch = total.new_empty(min(_BLOCK, len(total)), total.shape[1])
    for first in range(0, len(total), _BLOCK):
        block = total[first : first + _BLOCK]
        block += _by_openblas(a[first : first + _BLOCK], b, scratch[: len(block)])


_MULTIPLY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    TORCH: torch.mm,
    ONEDNN: lambda a, b: _by_onednn(a, b.t()) if a.numel() else a @ b,  # it refuses sums of nothing
    OPENBLAS: _by_openblas,
}
_ADD: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    TORCH: torch.Tensor.addmm_,
    ONEDNN: _add_by_onednn,
    OPENBLAS: _add_by_openblas,
}


def available() -> list[str]:
    """The libraries that are here."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return [TORCH, *([ONEDNN] if onednn else []), *([OPENBLAS] if _openblas() else [])]


@functools.cache
def choice() -> Choice:
    """The libraries that are used on this machine.

    Raises:
        TrainingError: if torch multiplies wrong, so that nothing can be trusted.
    """
    processor = devices.processor()
    found = _TABLE.get(processor, _TORCH_ALONE)
    if OPENBLAS in found and not (environment.openblas_rests() and proven(OPENBLAS)):
        found = _WITHOUT_OPENBLAS[processor]
    if ONEDNN in found and not (ONEDNN in available() and proven(ONEDNN)):
        found = _TORCH_ALONE
    if not proven(TORCH):
        cure = "install another build of it, or don't let it round (torch.set_float32_matmul_precision)"
        raise TrainingError(f"torch multiplies matrices wrong on this processor; {cure}")
    return found


def follow_threads() -> None:
    """Let OpenBLAS use as many threads as torch does."""
    _openblas_libraries().limit(limits=torch.get_num_threads())


def told(device: torch.device) -> dict[str, Any] | None:
    """What the bits of a run on a CPU depend on: its processor, threads, and which library computes what."""
    if device.type != "cpu":
        return None
    maker, capability = devices.processor()
    found: dict[str, Any] = {"maker": maker, "capability": capability, "threads": torch.get_num_threads()}
    found |= choice()._asdict()
    if OPENBLAS in _TABLE.get((maker, capability), ()) and OPENBLAS not in choice():
        found["careful"] = _why_not_openblas()
    return found


def in_words(told: dict[str, Any] | None) -> str:
    """A line for what is `told`; nothing of a device other than the CPU, or if it is damaged."""
    if not isinstance(told, dict) or told.keys() < {"maker", "capability", "threads", *Choice._fields}:
        return ""
    roles = {name: told[name] for name in Choice._fields}
    libraries = {name: [role.replace("_", " ") for role, by in roles.items() if by == name] for name in LIBRARIES}
    used = {name: ", ".join(its) for name, its in libraries.items() if its}
    by = "; ".join(f"{its} by {name}" for name, its in used.items()) if len(used) > 1 else f"by {', '.join(used)}"
    threads = f"{told['threads']} threads" if told["threads"] > 1 else "one thread"
    return f"{by} ({told['maker']}, {told['capability']}, {threads})" + (
        f"; {told['careful']}" if "careful" in told else ""
    )


def _why_not_openblas() -> str:
    if not _openblas():
        return "numpy has no OpenBLAS here, which is the fastest on this processor"
    if not environment.openblas_rests():
        return (
            "numpy was loaded before train_loop, so OpenBLAS, the fastest on this processor, would hold on to its cores"
            "; import train_loop first, or set OPENBLAS_THREAD_TIMEOUT=4"
        )
    return "OpenBLAS, the fastest on this processor, multiplies wrong here"


def _openblas_libraries() -> Any:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


@functools.cache
def _openblas() -> bool:
    """Whether numpy multiplies by OpenBLAS."""
    told: Any = np.show_config(mode="dicts")
    return "openblas" in str(told.get("Build Dependencies", {}).get("blas", {}).get("name", "")).lower()


@functools.cache
def proven(library: str) -> bool:
    """Whether a library multiplies right here: products as they are, transposed, with themselves, of odd shapes.

    Some builds are wrong on some processors, and only in some of these. The sums are compared with those in float64,
    within what rounding explains: each number may be off by (k + 2) 2^-24 times the sum of its k terms' sizes.
    """
    if library not in available():
        return False
    with torch.autocast("cpu", enabled=False), torch.no_grad(), torch.device("cpu"):
        return _multiplies_right(library)


def _multiplies_right(library: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    multiply, add_to = _MULTIPLY[library], _ADD[library]
    for m, k, n in ((1, 1, 1), (1, 300, 2), (17, 33, 65), (130, 257, 67), (64, 256, 192), (5, 0, 3)):
        a, b, wide = (
            torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((m, k), (k, n), (k, 2 * n))
        )
        pairs = [(a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b), (a, wide[:, n:])]
        pairs += [(a, a.t()), (a.t(), a), (b.t(), b)]
        for left, right in pairs:
            exact = _float64(left, right)
            within = (left.shape[1] + 2) * _ROUNDING * _float64(left.abs(), right.abs())
            total = torch.ones(exact.shape, dtype=torch.float32)
            add_to(total, left, right)
            found = multiply(left, right).double()
            close = (found - exact).abs() <= within
            added = (total.double() - 1 - exact).abs() <= within + 2 * _ROUNDING * (1 + exact.abs())
            if not bool(close.all() and added.all()):
                return False
    return True


def _float64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B in float64, by numpy's own loops and no library."""
    return torch.from_numpy(np.einsum("ik,kj->ij", a.double().numpy(), b.double().numpy(), optimize=False))
