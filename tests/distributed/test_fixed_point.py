"""Fixed-point sums: the same bits in any order, exact to fp32, and never silently too large or too coarse."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from train_loop import job
from train_loop.training.accumulators import TOLERANCE, FixedPointSum


def gradients(terms: int, size: int, scale: float, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.randn(terms, size, generator=generator).exp()
    return list((torch.randn(terms, size, generator=generator) * magnitudes * scale).unbind())


def total(terms: Sequence[torch.Tensor], targets: int = 1, tries: int = 3) -> tuple[torch.Tensor, FixedPointSum, int]:
    """Terms summed as a step does it: the sum, the sums object, and how often they had to be added."""
    parameter = torch.nn.Parameter(torch.zeros_like(terms[0]))
    sums = FixedPointSum(Accelerator(cpu=True), [parameter])
    sums.begin(len(terms))
    for attempt in range(1, tries + 1):
        for term in terms:
            parameter.grad = term.clone()
            sums.add()
            assert parameter.grad is None
        if sums.finish(targets):
            assert parameter.grad is not None
            return parameter.grad, sums, attempt
    raise AssertionError("the scale never fitted")


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e5, 1e20])
def test_any_order_gives_the_same_bits_and_the_exact_sum(scale: float) -> None:
    terms = gradients(5, 100, scale)
    exact = torch.tensor([math.fsum(column) for column in torch.stack(terms).T.tolist()], dtype=torch.float64)
    found = {total(list(order), 7)[0].numpy().tobytes() for order in itertools.permutations(terms)}
    assert len(found) == 1
    sums = total(terms, 7)[0].double()
    assert (sums - exact / 7).norm() <= 1e-6 * (exact / 7).norm()
    # Plain sums of floats do depend on the order: the test would see it.
    plain = {sum(order, torch.zeros(100)).numpy().tobytes() for order in itertools.permutations(terms)}
    assert len(plain) > 1


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.integers(1, 1000))
def test_components_of_common_size_keep_all_their_bits(values: list[float], targets: int) -> None:
    found, _, _ = total([torch.tensor([value, 1.0]) for value in values], targets)
    assert float(found[0]) == pytest.approx(math.fsum(values) / targets, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("scale", "attempts"), [(1.0, 1), (2.0**25, 2), (1e30, 2), (1e-25, 2)])
def test_a_scale_that_does_not_fit_is_seen_and_changed(scale: float, attempts: int) -> None:
    terms = gradients(3, 50, scale)
    found, sums, tries = total(terms)
    assert tries == attempts and sums.rounding <= TOLERANCE
    exact = torch.stack(terms).double().sum(0)
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


def test_the_largest_terms_do_not_overflow() -> None:
    largest = math.nextafter(2.0**20, 0)
    terms = [torch.full((3,), largest, dtype=torch.float32).clamp(max=2.0**20 * (1 - 2**-24))] * 7
    found, _, tries = total(terms)
    assert tries == 1 and torch.equal(found, torch.full((3,), float(terms[0][0]) * 7))


def test_precision_that_cannot_be_had_is_reported() -> None:
    large = torch.tensor([1e6, 0.0])
    found, sums, _ = total([large, -large, torch.tensor([0.0, 1e-12])])
    assert sums.rounding > TOLERANCE and torch.isfinite(found).all()
    _, sums, _ = total([torch.zeros(3)])
    assert sums.rounding == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(poison: float) -> None:
    found, _, _ = total([torch.ones(3), torch.tensor([1.0, poison, 1.0])])
    assert found.isnan().any()


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    sums = FixedPointSum(Accelerator(cpu=True), [used, unused])
    sums.begin(1)
    used.grad = torch.ones(2)
    sums.add()
    assert sums.finish(2)
    assert used.grad is not None and used.grad.tolist() == [0.5, 0.5]


def test_a_run_says_when_it_could_not_be_exact(settings: Callable[..., list[str]]) -> None:
    from train_loop.config.load import config_from_arguments
    from train_loop.training.accumulators import FixedPoint

    run = job.set_up(config_from_arguments(settings(run__reproducible="bitwise"))).run
    accumulator = run.context.accumulator
    assert isinstance(accumulator, FixedPoint)
    accumulator.sum.rounding = 1e-3
    assert accumulator.record() == {"fixed_point_rounding": 1e-3}
    accumulator.sum.rounding = 0.0
    assert accumulator.record() == {}
