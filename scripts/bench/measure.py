"""What the benchmarks share: alternating runs, medians, and a table of ratios."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from train_loop.metrics.log import MetricsLog
    from train_loop.training.state import Observer, Run


class Contender(NamedTuple):
    """Something to time: its name, and a function that does the work once and returns the seconds that count."""

    name: str
    run: Callable[[], float]


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; they take turns, so a slow minute of the machine hits all of them."""
    found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:  # warm up: imports, caches, first allocations
        contender.run()
    for turn in range(rounds):
        for contender in contenders[:: 1 if turn % 2 == 0 else -1]:
            found[contender.name].append(contender.run())
    return found


def steps_alone(run: "Run", log: "MetricsLog", *observers: "Observer") -> None:
    """Train a run to its end by the loop, with log and progress; what comes after its last step is left out."""
    from train_loop.console import Progress
    from train_loop.metrics.progress import ProgressLines
    from train_loop.training.loop import History, Loop

    with Progress("training", "step", run.batches.total_steps) as progress:
        watching: list[Observer] = [log, ProgressLines(progress, None), *observers]
        loop = Loop(run, History(), watching, save=lambda state, wait=False: None)
        loop._evaluate = lambda: False  # type: ignore[method-assign]
        loop.train()


def report(title: str, found: dict[str, list[float]], work: float, unit: str, as_json: bool) -> None:
    """Print medians, rates (`work` units a run) and each one's rate as a ratio to the first's.

    The ratio is the median of the rounds' own ratios: what varies between rounds cancels.
    """
    reference = next(iter(found.values()))
    rows = [
        {
            "name": name,
            "seconds": statistics.median(times),
            "rate": work / statistics.median(times),
            "ratio": statistics.median(first / time for first, time in zip(reference, times, strict=True)),
        }
        for name, times in found.items()
    ]
    if as_json:
        told = {"title": title, "processor": processor(), "unit": unit, "rounds": len(reference), "rows": rows}
        print(json.dumps(told))
        return
    print(f"\n{title} ({len(reference)} alternating rounds; medians)\n{processor()}\n")
    print(f"{'':44} {'seconds':>9} {unit + '/s':>14} {'ratio':>7}")
    for row in rows:
        print(f"{row['name']:44} {row['seconds']:9.4f} {row['rate']:14,.1f} {row['ratio']:7.3f}")


def processor() -> str:
    """The CPU, what it can do, and what it was told to do without."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in file)}
    flags = told.get("flags", "").split()
    able = [name for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    held_back = ", told to use AVX2 only" if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" else ""
    name = told.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {', '.join(able) or 'no AVX2'}{held_back}"


class _Capability(argparse.Action):
    """Tells the libraries, in this process (they are not loaded yet) and in those that it starts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        os.environ |= {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
        }
        namespace.capability = value


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=rounds, help=f"timed runs of each contender ({rounds})")
    told = "what the processor may use: all that it can, or AVX2 only, as if it were an older one"
    options.add_argument("--capability", choices=("avx2",), action=_Capability, help=told)
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return options
