"""The output layer's loss: that of all logits, and its gradients, with the logits of one chunk at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train_loop.data.loader import IGNORED
from train_loop.ops import cross_entropy, products
from train_loop.ops.cross_entropy import _LinearCrossEntropy, linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_is_torchs_in_chunks_of_any_size(chunk: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator) * 5 for size in ((20, 8), (31, 8), (31,)))
    targets = torch.randint(0, 31, (20,), generator=generator)
    targets[3:6] = IGNORED
    leaves = [each.requires_grad_() for each in ((hidden, weight, bias) if biased else (hidden, weight))]
    mine = _LinearCrossEntropy.apply(hidden, weight, bias if biased else None, targets, IGNORED, chunk, None)
    double = [each.detach().double().requires_grad_() for each in leaves]
    theirs = F.cross_entropy(F.linear(*double), targets, reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=0)
    found = torch.autograd.grad(3 * mine, leaves)
    for gradient, expected in zip(found, torch.autograd.grad(3 * theirs, double), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again = _LinearCrossEntropy.apply(hidden, weight, bias if biased else None, targets, IGNORED, chunk, None)
    assert torch.equal(again, mine)


@pytest.mark.parametrize("way", ["_in_place", "_rounded", "_compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_almost_certain_still_has_a_gradient(dtype: torch.dtype, way: str) -> None:
    """p - 1 is -0.002 there, and 1 - 0.998 would be 0 or -0.004 in bf16."""
    logits, target = torch.randn(50, 300).to(dtype), torch.randint(0, 300, (50, 1))
    logits.scatter_(1, target, 12.0)
    exact = logits.double().softmax(-1).scatter_add_(1, target, torch.full((50, 1), -1.0).double())
    nll, gradient = getattr(cross_entropy, way)(logits.clone(), target, torch.ones(50, 1), True)
    assert gradient is not None and gradient.dtype == dtype
    expected = F.cross_entropy(logits.double(), target[:, 0], reduction="none")
    torch.testing.assert_close(nll[:, 0].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=5e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_under_autocast_it_is_the_plain_one_to_rounding(
    monkeypatch: pytest.MonkeyPatch, bias: bool, dtype: torch.dtype | None
) -> None:
    """nll and gradients are those of all logits in float64, and small gradients don't vanish in fp16."""
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", 16)
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 24, requires_grad=True), nn.Linear(24, 3000, bias=bias)
    targets = torch.randint(0, 300, (70,))
    targets[3:60:7] = IGNORED
    leaves = [hidden, *head.parameters()]
    double = [each.detach().double().requires_grad_() for each in leaves]
    exact = 2**10 * F.cross_entropy(F.linear(*double), targets, reduction="sum")
    expected = [exact, *torch.autograd.grad(exact, double)]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        nll = linear_cross_entropy(hidden, head.weight, head.bias, targets, IGNORED)
    assert nll.dtype == torch.float32
    scaled = 2**10 * nll  # as a loss is in fp16
    for mine, theirs in zip([scaled, *torch.autograd.grad(scaled, leaves)], expected, strict=True):
        difference = float((mine.detach().double() - theirs.detach()).norm() / theirs.detach().norm())
        assert difference < (1e-6 if dtype is None else 1e-2)
        assert (mine[theirs != 0] == 0).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_it_holds_the_logits_of_a_chunk_only(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    monkeypatch.setattr(products, "choice", lambda: products.by_one(products.TORCH))  # calls `F.linear`
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", 16 if dtype else 32)  # of fp32; twice as many in 16 bits
    sizes: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: sizes.append(len(arguments[0])) or linear(*arguments))
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    kept: list[Any] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        nll = linear_cross_entropy(hidden, weight, None, torch.zeros(100, dtype=torch.int64), IGNORED)
    assert sizes == [32, 32, 32, 4] and not any(50 in shape and len(shape) == 2 and shape[0] > 32 for shape in kept)
    nll.backward()
    again = [4, 32, 32, 32] if dtype == torch.float16 else []
    assert sorted(sizes[4:]) == again


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_a_product_is_compiled_for_gradients(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """torch's meta device stands for a GPU; a CPU computes in place."""
    chunks: list[int] = []

    def told(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chunks.append(len(logits))
        return logits[:, :1].float(), logits

    monkeypatch.setattr(cross_entropy, "_compiled", told)
    hidden = torch.randn(128, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    given = hidden, torch.randn(50, 8, device=device), None, torch.zeros(128, dtype=torch.int64, device=device)
    _LinearCrossEntropy.apply(*given, IGNORED, 32, None, True)
    assert chunks == ([32] * 4 if device == "meta" else [])
    _LinearCrossEntropy.apply(*given, IGNORED, 32, None, False)
    _LinearCrossEntropy.apply(hidden.detach(), *given[1:], IGNORED, 32, None, True)
    assert len(chunks) == (4 if device == "meta" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_16_bits_are_compiled(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Larger chunks than these would not fit."""
    given: list[Any] = []
    told = SimpleNamespace(apply=lambda *arguments: given.extend(arguments))
    monkeypatch.setattr(cross_entropy, "_LinearCrossEntropy", told)
    hidden, weight = torch.randn(20, 8, dtype=dtype), torch.randn(50, 8)
    linear_cross_entropy(hidden, weight, None, torch.zeros(20, dtype=torch.int64), IGNORED, None, True)
    assert given[-1] is (dtype == torch.bfloat16)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(20, 8, requires_grad=True), nn.Linear(8, 50)
    given = hidden, head.weight, head.bias, torch.randint(0, 50, (20,)), IGNORED
    expected = linear_cross_entropy(*given)
    monkeypatch.setattr(products, "to_inputs", None)
    monkeypatch.setattr(cross_entropy, "_added", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*given), expected)


@pytest.mark.parametrize("vocabulary", [7, 50_257, 128_256, 1 << 31])
def test_chunks_that_should_be_alike_are_powers_of_two_and_hold_a_gigabyte_at_most(vocabulary: int) -> None:
    bf16 = cross_entropy.chunk_size("cuda", vocabulary, torch.bfloat16, True)
    assert bf16 == 1 or 2 * bf16 * vocabulary <= 1 << 30
    fp32 = cross_entropy.chunk_size("cpu", vocabulary, torch.float32)
    assert fp32 == 1 or 4 * fp32 * vocabulary <= 1 << 26  # so that a large vocabulary takes no more memory
    assert bf16.bit_count() == fp32.bit_count() == 1


def test_sums_in_16_bits_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(9, 50, generator=generator), torch.randn(9, 8, generator=generator)) for _ in range(200)]
    total = None
    for a, b in pairs:
        total = products.add_rounded(total, a.bfloat16(), b.bfloat16())
    assert total is not None and total.dtype == torch.float32
    exact = sum(a.bfloat16().double().t() @ b.bfloat16().double() for a, b in pairs)
    # Each product is rounded to bf16; a total in bf16 would be off by ten times as much.
    assert float((total - exact).norm() / torch.as_tensor(exact).norm()) < 0.003
