"""Which library multiplies: the table's, never one that multiplies wrong, and whichever it is, the same numbers."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl
import torch
import torch.nn.functional as F

from tests.support.runs import Command
from train_loop import devices, environment, job
from train_loop.config.load import config_from_arguments
from train_loop.errors import TrainingError
from train_loop.ops import products
from train_loop.ops.products import LIBRARIES, ONEDNN, OPENBLAS, TORCH, Choice
from train_loop.training.state import Observer, TrainState

AMD, NEWER_AMD, INTEL = ("AuthenticAMD", "AVX2"), ("AuthenticAMD", "AVX512"), ("GenuineIntel", "AVX512")
CHOICE = products.choice.__wrapped__  # worked out anew each time


@pytest.fixture(params=products.available())
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "choice", lambda: products.by_one(request.param))
    return str(request.param)


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("transposed", [False, True], ids=["as a Linear's", "as a Conv1D's"])
def test_roles_are_what_they_say(library: str, transposed: bool) -> None:
    x, weight, bias, gradient, total = drawn((2, 51, 40), (70, 40), (70,), (2, 51, 70), (70, 40))
    weight = weight.t().contiguous().t() if transposed else weight
    rows, flat = gradient.flatten(0, 1), x.flatten(0, 1)
    exact = F.linear(x.double(), weight.double(), bias.double())
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(products.forward(x, weight, bias).double(), exact, **close)
    torch.testing.assert_close(products.forward(x, weight).double(), exact - bias.double(), **close)
    torch.testing.assert_close(products.forward(x[:1, :1], weight, bias).double(), exact[:1, :1], **close)
    torch.testing.assert_close(
        products.to_inputs(gradient, weight).double(), gradient.double() @ weight.double(), **close
    )
    expected = rows.double().t() @ flat.double()
    torch.testing.assert_close(products.to_weights(rows, flat).double(), expected, **close)
    torch.testing.assert_close(products.to_weights(flat, rows).double(), expected.t(), **close)
    added = total.clone()
    products.add(added, rows, flat)
    torch.testing.assert_close(added.double(), total.double() + expected, **close)


def test_nothing_to_multiply_is_nothing(library: str) -> None:
    weight, nothing = torch.ones(3, 4), torch.ones(0, 4)
    assert products.forward(nothing, weight).shape == (0, 3)
    assert products.to_inputs(torch.ones(0, 3), weight).shape == (0, 4)
    assert torch.equal(products.to_weights(torch.ones(0, 3), nothing), torch.zeros(3, 4))


def test_a_result_longer_than_a_block_is_added_whole(library: str) -> None:
    rows, inputs, total = drawn((6, 2 * products._BLOCK + 5), (6, 3), (2 * products._BLOCK + 5, 3))
    added = total.clone()
    products.add(added, rows, inputs)
    torch.testing.assert_close(added, total + rows.t() @ inputs, rtol=1e-4, atol=1e-4)


def test_several_threads_at_once_get_their_own_products(library: str) -> None:
    a, b = drawn((64, 48), (64, 96))
    together = threading.Barrier(4)

    def work(number: int) -> bool:
        expected = ((number + 1) * a.double()).t() @ b.double()
        together.wait()
        found = [products.to_weights((number + 1) * a, b).double() for _ in range(50)]
        return all(torch.allclose(each, expected, rtol=1e-4, atol=1e-4) for each in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_every_library_here_is_proven_wherever_it_is_asked_for_first() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    for autocast in (False, True):
        torch.set_default_dtype(torch.float64 if autocast else torch.float32)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.device("meta" if autocast else "cpu"):
                assert all(products.proven.__wrapped__(library) for library in products.available())
        finally:
            torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right, a, b: right(a, b) + 1e-3,
        lambda right, a, b: right(a, b).bfloat16().float(),
        lambda right, a, b: right(a, b) if a.data_ptr() != b.data_ptr() else right(a, b).tril(),  # A A^T
        lambda right, a, b: right(a, b) if a.is_contiguous() else right(a.contiguous() * 1.001, b),
        lambda right, a, b: right(a, b) if b.stride(0) == b.shape[1] or b.stride(0) == 1 else right(a, b.roll(1, 0)),
        lambda right, a, b: right(a, b) if a.shape[1] else torch.ones(a.shape[0], b.shape[1]),  # sums of nothing
    ],
    ids=["a bit off", "half precision", "of itself", "transposed", "strided", "empty"],
)
def test_a_library_that_multiplies_wrong_is_found_out(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = products._MULTIPLY[TORCH]
    monkeypatch.setitem(products._MULTIPLY, TORCH, lambda a, b: wrong(right, a, b))
    assert not products.proven.__wrapped__(TORCH)


def test_a_library_that_adds_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(products._ADD, TORCH, lambda total, a, b: total.addmm_(a, b, beta=0.5))
    assert not products.proven.__wrapped__(TORCH)


def chosen(
    monkeypatch: pytest.MonkeyPatch, processor: tuple[str, str], wrong: str = "", missing: str = "", rests: bool = True
) -> Choice:
    monkeypatch.setattr(devices, "processor", lambda: processor)
    monkeypatch.setattr(environment, "openblas_rests", lambda: rests)
    monkeypatch.setattr(products, "available", lambda: [each for each in LIBRARIES if each != missing])
    monkeypatch.setattr(products, "proven", lambda library: library not in (wrong, missing))
    monkeypatch.setattr(products, "_openblas", lambda: missing != OPENBLAS)
    monkeypatch.setattr(products, "choice", CHOICE)
    return products.choice()


def by(found: Choice) -> set[str]:
    return {each for each in found if isinstance(each, str)}


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by(chosen(monkeypatch, INTEL)) == {TORCH}
    assert by(chosen(monkeypatch, AMD)) == {OPENBLAS}
    assert chosen(monkeypatch, NEWER_AMD) == Choice(ONEDNN, ONEDNN, TORCH, ONEDNN, TORCH)
    for unknown in (("aarch64", "DEFAULT"), ("GenuineIntel", "DEFAULT"), ("", "")):
        assert by(chosen(monkeypatch, unknown)) == {TORCH}


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ({"wrong": OPENBLAS}, "multiplies wrong"),
        ({"missing": OPENBLAS}, "no OpenBLAS"),
        ({"rests": False}, "OPENBLAS_THREAD_TIMEOUT=4"),
    ],
)
def test_without_openblas_the_next_best_is_used_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, reason: Any, said: str
) -> None:
    found = chosen(monkeypatch, AMD, **reason)
    assert OPENBLAS not in found and ONEDNN in found
    told = products.told(torch.device("cpu"))
    assert told is not None and said in told["careful"] and said in products.in_words(told)


def test_what_is_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(monkeypatch, NEWER_AMD)
    told = products.told(torch.device("cpu"))
    assert told is not None and (told["maker"], told["capability"]) == NEWER_AMD and "careful" not in told
    assert told["forward"] == ONEDNN and told["to_weights"] == TORCH
    words = products.in_words(told | {"threads": 2})
    by = "to weights, add by torch; forward, to inputs, to wide weights by onednn"
    assert words == f"{by} (AuthenticAMD, AVX512, 2 threads)"
    assert products.told(torch.device("meta")) is None and products.in_words(None) == ""


def test_a_wrong_onednn_is_not_used_and_a_wrong_torch_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by(chosen(monkeypatch, NEWER_AMD, wrong=ONEDNN)) == {TORCH}
    with pytest.raises(TrainingError, match="torch multiplies matrices wrong"):
        chosen(monkeypatch, INTEL, wrong=TORCH)


@pytest.mark.skipif(OPENBLAS not in products.available(), reason="numpy has no OpenBLAS")
def test_openblas_has_torchs_number_of_threads() -> None:
    before = torch.get_num_threads()

    def threads() -> set[int]:
        return {each["num_threads"] for each in threadpoolctl.threadpool_info() if each["internal_api"] == "openblas"}

    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            products.follow_threads()
            assert threads() == {number}
    finally:
        torch.set_num_threads(before)
        products.follow_threads()


@pytest.mark.parametrize(("first", "rests"), [("import train_loop, numpy", True), ("import numpy, train_loop", False)])
def test_openblas_rests_where_train_loop_came_before_numpy(first: str, rests: bool) -> None:
    code = (
        f"{first}; import os; from train_loop import environment as e; print(e.openblas_rests(), os.environ[e._RESTS])"
    )
    environ = {name: value for name, value in os.environ.items() if name != environment._RESTS}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert ended.stdout.split() == [str(rests), "4"]
    environ[environment._RESTS] = "20"  # the user's own
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert ended.stdout.split() == ["True", "20"]


def test_a_run_that_goes_on_by_other_products_says_so(
    command: Command, settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Stop(Observer):
        def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = settings(train__max_steps=3)
    job.train(config_from_arguments(arguments), callbacks=[Stop()])
    sheet = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert sheet["products"] == products.told(torch.device("cpu"))
    job.train(config_from_arguments(arguments), callbacks=[Stop()])
    told = products.told
    monkeypatch.setattr(products, "told", lambda device: (told(device) or {}) | {"threads": 77})
    assert command("train", *arguments) == 0, command.err
    assert command.err.count("careful: matrix products until now: ") == 1 and "77 threads); so losses" in command.err
    assert "\nproducts       " in command.err
