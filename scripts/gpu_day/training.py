"""Part "training": tokens per second, MFU, memory and what the loop adds, by scripts/bench/gpu.py.

Compiling takes most of the time: a contender that is not ready when three quarters of its shape's time are over is left
out, and a row says so. Few steps and rounds are what is left; scripts/bench/gpu.py by itself takes more of both.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_day.rows import Finding, Rows, Skipped, figure, one_line, part

_BENCH = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"
_TINY = "--cpu --eager --layers 2 --width 64 --vocabulary 512 --block 64 --sequences 4 --steps 2 --rounds 2".split()
# Sequences that leave room for three contenders' states on 80 GB.
_SHAPES = {
    "gpt2-124m": "--sequences 16 --steps 20 --rounds 3".split(),
    "llama-1b": "--sequences 2 --steps 10 --rounds 3".split(),
}
_LATE = "was not ready in time"  # what scripts/bench/gpu.py says of a contender
_RESERVE_SECONDS = 10  # of the part's time, for its last rows
_PATIENCE_SHARE = 0.75  # of a shape's time, until its contenders must be ready


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """Both shapes, one after the other: nothing else is at work meanwhile. The second has what the first one leaves."""
    for shape, sizes in _SHAPES.items():
        bench = Bench(shape, _TINY if cpu else sizes, rows.seconds_left - _RESERVE_SECONDS)
        rows.check(f"{shape}: tokens per second", bench.run)
        for name, reason in bench.left_out.items():
            rows.add(f"{shape}: {name}", Finding(None, "skipped", why=f"left out: {reason}"))
        if bench.told:
            rows.check(f"{shape}: MFU", bench.numbers, "mfu, ", "", "of the rate of a large matrix product in bf16")
            rows.check(f"{shape}: peak memory", bench.numbers, "peak_mb, ", "MB", "of a turn")
            rows.check(f"{shape}: what the loop adds to a step", bench.overhead)


class Bench:
    """One shape's run of scripts/bench/gpu.py.

    Args:
        shape: of the model.
        sizes: further options.
        seconds: that it has.

    Attributes:
        told: the numbers beside the speeds.
        left_out: contenders, and why.
    """

    def __init__(self, shape: str, sizes: list[str], seconds: float) -> None:
        self._seconds = seconds
        patience = ["--patience", f"{_PATIENCE_SHARE * seconds:.0f}"]
        self._command = [sys.executable, str(_BENCH), "--shape", shape, *sizes, *patience, "--loop_only", "--json"]
        self.told: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    def run(self) -> Finding:
        """Tokens per second of each contender, and how they are to the first one's."""
        if self._seconds < 10:
            raise Skipped(f"{self._seconds:.0f} s are left, which is not enough to compile anything")
        try:
            ended = subprocess.run(self._command, capture_output=True, text=True, timeout=self._seconds, check=False)
        except subprocess.TimeoutExpired:
            raise Skipped(f"took longer than the {self._seconds:.0f} s that were left") from None
        print(ended.stdout, ended.stderr, flush=True)
        for line in ended.stderr.splitlines():
            name, found, reason = line.partition(" is left out: ")
            if found:
                self.left_out[name] = one_line(reason)
        if _LATE in self.left_out.get("train_loop", ""):
            raise Skipped(f"train_loop {_LATE} of {self._seconds:.0f} s: nothing to compare with")
        lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
        if ended.returncode or len(lines) < 2:
            raise RuntimeError(f"exit code {ended.returncode}: {one_line((ended.stderr.splitlines() or ['?'])[-1])}")
        table, self.told = lines[:2]
        rates = {row["name"]: row["rate"] for row in table["rows"]}
        ratios = ", ".join(f"{row['name']} {row['ratio']:.3f}" for row in table["rows"][1:])
        return figure(
            rates, "tokens/s", f"{table['title']}, {table['rounds']} rounds; of {table['rows'][0]['name']}'s: {ratios}"
        )

    def numbers(self, prefix: str, unit: str, why: str) -> Finding:
        """One kind of number of each contender."""
        found = {key.removeprefix(prefix): value for key, value in self.told.items() if key.startswith(prefix)}
        return figure(found, unit, why)

    def overhead(self) -> Finding:
        """Of train_loop's step beside the same model and optimizer without its loop."""
        share = self.told["loop_overhead_share"]
        return figure(self.told["loop_overhead_ms_a_step"], "ms", f"{share:.1%} of the bare step")


if __name__ == "__main__":
    part(checks)
