"""All matrix products of a training step, by each library, and whether train_loop's table takes the fastest.

    python scripts/bench/products.py [--shape distilgpt2 | llama-128k] [--capability avx2] [--rounds 5] [--json]

8 x 128 tokens, fp32. The products are those of the model's linear layers and of its output layer, chunk by chunk, in
the order and the shapes of a step, each with weights of its own, so that they come from memory as in a step. Libraries
disturb each other (their threads stay awake for a while), so each has a process of its own and computes when it is its
turn. The last contender multiplies as the table of `train_loop/ops/products.py` says for this processor.
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from measure import Contender, alternate, parser, report

ROWS = 8 * 128
# Of the model's layers: how many, and the (inputs, outputs) of their linear layers; of the output layer; the chunk.
SHAPES: dict[str, tuple[int, list[tuple[int, int]], tuple[int, int]]] = {
    "distilgpt2": (6, [(768, 2304), (768, 768), (768, 3072), (3072, 768)], (768, 50257)),
    "llama-128k": (4, [(512, 512)] * 4 + [(512, 1536)] * 2 + [(1536, 512)], (512, 128256)),
}
TABLE = "as the table says"
_WRONG = 0.1  # a product that another library computes in this share less time is told


class Library:
    """A process that computes a step's products by one library whenever it is asked to.

    Attributes:
        each: the seconds of each product of a step, by its name, of every turn.
        chosen: what the table says on this processor.
    """

    def __init__(self, name: str, shape: str) -> None:
        self.each: dict[str, list[float]] = defaultdict(list)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__, "--shape", shape, "--multiply_by", name], **pipes)
        self.chosen: dict[str, str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"products.py: a process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def step(self) -> float:
        """Seconds of a step's products."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        told = self._read()
        for name, seconds in told.items():
            self.each[name].append(seconds)
        return float(sum(told.values()))

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def libraries() -> list[str]:
    """The libraries that are here."""
    code = "from train_loop.ops import products; print(*products.available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--shape", choices=SHAPES, default="distilgpt2", help="of the model (distilgpt2)")
    options.add_argument("--multiply_by", help="what a process started by this one multiplies by")
    given = options.parse_args()
    if given.multiply_by:
        with contextlib.redirect_stdout(sys.stderr):
            _serve(given.multiply_by, given.shape)
        return
    processes = {name: Library(name, given.shape) for name in (*libraries(), TABLE)}
    found = alternate([Contender(name, each.step) for name, each in processes.items()], given.rounds)
    for process in processes.values():
        process.kill()
    operations = sum(_operations(name) for name in processes[TABLE].each)
    report(f"all products of a step, {given.shape}, {ROWS} tokens", found, operations / 1e9, "GFLOP", given.json)
    told = {name: _rates(process) for name, process in processes.items()}
    chosen = processes[TABLE].chosen
    if given.json:
        print(json.dumps({"gflop_per_second": told, "table": chosen}))
        return
    print(f"\n{'GFLOP a second':44}" + "".join(f"{name:>20}" for name in told))
    for product in told[TABLE]:
        print(f"{product:44}" + "".join(f"{rates[product]:20,.0f}" for rates in told.values()))
    print(f"\nthe table: {', '.join(f'{role} {name}' for role, name in chosen.items())}")
    for product, rate in told.pop(TABLE).items():
        best_rate, best = max((rates[product], name) for name, rates in told.items())
        if rate < (1 - _WRONG) * best_rate:
            print(f"the table is wrong for {product}: {best} computes it at {best_rate / rate:.2f} times its rate")


def _rates(process: Library) -> dict[str, float]:
    """Billions of operations a second of each kind of product."""
    seconds: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    for name, times in process.each.items():
        kind = name.split(", number")[0]
        seconds[kind] += statistics.median(times)
        operations[kind] += _operations(name)
    return {kind: operations[kind] / seconds[kind] / 1e9 for kind in seconds}


def _operations(name: str) -> float:
    rows, inputs, outputs = (int(each) for each in name.split(":")[0].split(" x "))
    return 2.0 * rows * inputs * outputs


def _serve(library: str, shape: str) -> None:
    import train_loop  # noqa: F401  before torch, which loads numpy

    # isort: split
    import torch

    from train_loop.ops import cpu, cross_entropy, products

    chosen = products.choice()
    if library != TABLE:
        forced = products.by_one(library)
        products.choice = lambda: forced  # type: ignore[assignment]
    cpu.keep_freed_memory()
    products.follow_threads()
    layers, linear, head = SHAPES[shape]
    work: dict[str, Callable[[], object]] = {}
    total: list[Any] = [None]

    def add_up(gradient: torch.Tensor, x: torch.Tensor) -> None:
        if total[0] is None:
            total[0] = torch.zeros(head[1], head[0])
        products.add(total[0], gradient, x)

    def plan(sizes: tuple[int, int], rows: int, number: int, adds: bool) -> None:
        inputs, outputs = sizes
        x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        name, of = f"{rows} x {inputs} x {outputs}", f"number {number}"
        work[f"{name}: forward, {of}"] = functools.partial(products.forward, x, weight)
        work[f"{name}: to inputs, {of}"] = functools.partial(products.to_inputs, gradient, weight)
        if adds:
            work[f"{name}: added to what is there, {of}"] = functools.partial(add_up, gradient, x)
        else:
            work[f"{name}: to weights, {of}"] = functools.partial(products.to_weights, gradient, x)

    chunk = cross_entropy._CPU_CHUNK
    for number in range(layers):
        for place, sizes in enumerate(linear):
            plan(sizes, ROWS, number * len(linear) + place, False)
    for number in range(ROWS // chunk):
        plan(head, chunk, number, number > 0)
    print(json.dumps(chosen._asdict()), file=sys.__stdout__, flush=True)
    while sys.stdin.readline():
        told = {}
        for name, multiply in work.items():
            began = time.perf_counter()
            multiply()
            told[name] = time.perf_counter() - began
        print(json.dumps(told), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
