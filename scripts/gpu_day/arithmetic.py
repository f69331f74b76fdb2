"""Arithmetic on a device, against float64 on the CPU: precision switches, products, threads (for `traps.py`)."""

import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from gpu_day.models import device, only_on
from gpu_day.rows import Finding, Skipped, at_most, figure, holds

_ONE = 1 + 2.0**-12
"""Has a digit in fp32 that TF32 (10 bits after the point) and bf16 (7) don't have."""
_SIDE = 256
_SHAPES = ((1, 1, 1), (3, 5, 7), (17, 31, 65), (64, 64, 64), (129, 257, 33), (1, 1000, 1), (255, 1, 511), (16, 0, 8))


def vectors_from_the_start() -> Finding:
    """exp and log of long vectors, in two threads, as the first thing that a process computes."""
    x = torch.linspace(0.01, 20, 2_000_001)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    _in_threads(2, lambda number: seen.append((x.exp(), x.log())))
    exp, log = x.double().exp(), x.double().log()
    errors = [float(max(((e / exp) - 1).abs().max(), (g - log).abs().max())) for e, g in seen]
    # fp32 rounds exp to 6e-8 of itself, and log, at most 4.6 here, to 2.4e-7; a few of these is what libraries promise.
    return at_most(max(errors), 1e-6, why="exp relative, log absolute, 2 threads, CPU")


def survivors() -> dict[str, bool]:
    """In which operations on the device 1 + 2^-12 comes out as it went in."""
    on = device()
    whole = torch.randint(-8, 9, (_SIDE, _SIDE), generator=torch.Generator().manual_seed(0)).float().to(on)
    nearly = _ONE * torch.eye(_SIDE, device=on)
    expected = whole * _ONE  # exact: five bits times thirteen
    one_hot = 1000 * torch.eye(_SIDE, 64, device=on)[None, None]  # its softmax is 1 at the first of its kind
    values = expected[None, None, :, :64].contiguous()
    weight = nearly.clone().requires_grad_()
    (whole @ weight).backward(_ONE * torch.eye(_SIDE, device=on))
    assert weight.grad is not None
    batches = [each.expand(3, -1, -1).contiguous() for each in (whole, nearly)]
    attended = F.scaled_dot_product_attention(
        one_hot[..., :64, :], one_hot[..., :64, :], values[..., :64, :], scale=1.0
    )
    return {
        "matmul": torch.equal(whole @ nearly, expected),
        "linear": torch.equal(F.linear(whole, nearly), expected),
        "addmm": torch.equal(torch.addmm(torch.zeros(_SIDE, device=on), whole, nearly), expected),
        "bmm": torch.equal(torch.bmm(*batches), expected.expand(3, -1, -1)),
        "einsum": torch.equal(torch.einsum("ij,jk->ik", whole, nearly), expected),
        "attention": torch.equal(attended, values[..., :64, :]),
        "gradient": torch.equal(weight.grad, whole.t() * _ONE),
    }


def fp32_is_fp32() -> Finding:
    """Nothing that computes in fp32 rounds to less, as torch stands when a process begins."""
    found = survivors()
    lost = [name for name, survives in found.items() if not survives]
    why = f"lost in {', '.join(lost)}" if lost else ", ".join(found)
    return holds(not lost, "lost" if lost else "kept", "1 + 2^-12 kept", why)


def switches() -> Finding:
    """TF32 comes when it is asked for, and is gone when it is not."""
    only_on("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        on = survivors()
        torch.set_float32_matmul_precision("highest")
        off = survivors()
    finally:
        torch.set_float32_matmul_precision(before)
    if torch.cuda.get_device_capability() < (8, 0):
        raise Skipped("this GPU has no TF32")
    rounded = [name for name, survives in on.items() if not survives]
    promise = bool(rounded) and all(off.values())
    return holds(promise, "on, off again" if promise else "stuck", "on, off again", f"rounds {', '.join(rounded)}")


def _operands(m: int, k: int, n: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pairs to multiply: plain, transposed, every second column, one row expanded; on the device."""
    generator = torch.Generator().manual_seed(m + 1000 * k + 1000000 * n)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device(), dtype)

    a, b = drawn(m, k), drawn(k, n)
    yield "A B", a, b
    yield "B^T A^T", b.t(), a.t()
    yield "A A^T", a, a.t()
    yield "A^T A", a.t(), a
    yield "strides", drawn(m, 2 * k)[:, ::2], drawn(2 * k, n)[::2]
    yield "columns first", drawn(k, m).t(), drawn(n, k).t()
    yield "expanded", drawn(1, k).expand(m, k), b


def products(dtype: torch.dtype) -> Finding:
    """Matrix products of odd shapes and strides, against float64 on the CPU."""
    worst, where = 0.0, "none is off"
    for m, k, n in _SHAPES:
        for name, x, y in _operands(m, k, n, dtype):
            excess = _excess(x @ y, x, y)
            if not excess <= worst:
                worst, where = excess, f"most in {name} of {m} x {k} x {n}"
            if not excess <= 1:
                return at_most(excess, 1, "of what rounding explains", where)
    return at_most(worst, 1, "of what rounding explains", where)


def _excess(product: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest error of a product's elements, in units of what rounding can make of them.

    Adding up k products in fp32, in whatever order, is off by at most k u |A| |B|, with u = 2^-24 (Higham, "Accuracy
    and Stability of Numerical Algorithms", 2002, section 3.1); a result in half precision is rounded once more, and
    libraries may round parts of the sum, too, for which four times that is left.
    """
    exact_x, exact_y = x.cpu().double(), y.cpu().double()
    size = exact_x.abs() @ exact_y.abs()
    bound = (x.shape[1] + 1) * 2.0**-24 * size
    if product.dtype != torch.float32:
        # The smallest normal number is what may be flushed to zero.
        kind = torch.finfo(product.dtype)
        bound = bound + 4 * kind.eps / 2 * size + kind.smallest_normal
    if product.shape != size.shape:
        return float("inf")
    error = (product.cpu().double() - exact_x @ exact_y).abs()
    return float((error / bound.clamp(min=1e-300)).max()) if error.numel() else 0.0


def threads() -> Finding:
    """Several Python threads that multiply at once, each its own matrices, again and again."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(193, 193, generator=generator).to(device()) for _ in range(2)] for _ in range(8)]
    worst = [0.0] * len(pairs)

    def multiply(number: int) -> None:
        x, y = pairs[number]
        for _ in range(20):
            error = _excess(x @ y, x, y)
            worst[number] = error if not error <= worst[number] else worst[number]

    _in_threads(len(pairs), multiply)
    return at_most(max(worst), 1, "of what rounding explains", f"{len(pairs)} threads, 20 products each")


def repeated() -> Finding:
    """Whether one product, made twenty times, has the same bits each time."""
    x, y = (torch.randn(777, 777, generator=torch.Generator().manual_seed(seed)).to(device()) for seed in (0, 1))
    first = x @ y
    same = sum(torch.equal(x @ y, first) for _ in range(20))
    return figure(same, "of 20 products with the first one's bits")


def _in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(number)` in threads that begin together.

    Raises:
        RuntimeError: where one of them ended in an error.
    """
    together, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        together.wait()
        try:
            work(number)
        except Exception as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for each in started:
        each.start()
    for each in started:
        each.join()
    if errors:
        raise RuntimeError(f"{len(errors)} of {count} threads: {errors[0]}")
