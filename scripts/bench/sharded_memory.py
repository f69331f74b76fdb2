"""Peak memory of each process of a sharded run, from its start to its verified export, seen from outside.

    python scripts/bench/sharded_memory.py [--processes 2] [--parameters 450m] [--shape llama | gpt2] [--pretrained]
        [--sharding fsdp2 | ddp] [--micro_batches 2] [--phases] [--json] [--set KEY=VALUE ...]

A real training over gloo, launched by Accelerate: a few steps of tiny micro-batches, with checkpoints, evaluations,
samples and the export. This process looks at the others: every 10 ms it reads what /proc/PID/status says, and twice a
second the slower /proc/PID/smaps_rollup.

    anonymous   memory that a process has for itself: nothing but swapping frees it. The bound is about this
    RSS         with the pages of files (libraries, memory-mapped weights), which the kernel can drop, and which several
                processes may share; "kernel" is the peak that the kernel itself noted (VmHWM), so that nothing between
                two looks is lost
    PSS         the same with each shared page divided by the number of processes that have it

The bound for W processes, P parameters in fp32, of which the largest unit that is gathered at once has L:

    1.25 x (4 P weights + 4 P gradients + 8 P moments + 12 P of the copy that is saved) / W + 4 L + 0.6 GB

Each process itself notes when a phase begins, by a clock that all share: an import, a function of train_loop that is
entered or left. While a checkpoint is written in the background, training counts as saving. The process that verifies
the export is a row of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAUSE_SECONDS, SLOW_PAUSE_SECONDS = 0.01, 0.5
STEPS, BLOCK = 4, 64
PHASES = (
    *("imports", "building", "truth sheet", "training", "saving"),
    *("evaluation", "samples", "export", "verification", "rest"),
)
# What a process is doing while it is inside of a function.
MARKED = (
    ("train_loop.job", "set_up", "building"),
    ("train_loop.analysis.truth_sheet", "measure", "truth sheet"),
    ("train_loop.training.loop", "Loop.train", "training"),
    ("train_loop.checkpoint.manager", "CheckpointManager.save_async", "saving"),
    ("train_loop.checkpoint.manager", "CheckpointManager.wait", "saving"),
    ("train_loop.training.loop", "evaluate", "evaluation"),
    ("train_loop.analysis.samples", "Samples.after_evaluation", "samples"),
    ("train_loop.job", "finalize", "export"),
    ("train_loop.export.verify", "verify", "verification"),
)
WRITES = ("train_loop.checkpoint.manager", "CheckpointManager._write")
MAPPED, VERIFIER = "verification", "verify_subprocess.py"


def main() -> None:
    """Run the benchmark, or be one of its processes."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] == ["--make"]:
        make(json.loads(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        measure(options().parse_args())


def options() -> argparse.ArgumentParser:
    """The options of the benchmark."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--processes", type=int, default=2, help="of the run (2)")
    found.add_argument("--parameters", default="450m", help="of the model, about: 1m, 450m, 1b (450m)")
    found.add_argument("--shape", choices=("llama", "gpt2"), default="llama", help="of the model (llama)")
    found.add_argument("--pretrained", action="store_true", help="start from a folder instead of from random weights")
    found.add_argument("--sharding", choices=("fsdp2", "ddp"), default="fsdp2", help="of the run (fsdp2)")
    found.add_argument("--micro_batches", type=int, default=2, help="of a process in a step, one sequence each (2)")
    found.add_argument("--phases", action="store_true", help="print the peaks of each phase, too")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
    found.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The model, and the run


def shape(kind: str, text: str) -> dict[str, Any]:
    """An architecture of about so many parameters ("450m"); a layer has about 12 width^2, there is one per 64 width."""
    wanted = float(text[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[text[-1].lower()]

    def made(width: int) -> dict[str, Any]:
        layers, vocabulary = max(2, width // 64), max(1024, 16 * width)
        if kind == "gpt2":
            sides = {"n_embd": width, "n_layer": layers, "n_head": width // 32, "n_positions": BLOCK}
        else:
            sides = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
            sides |= {"intermediate_size": width * 8 // 3 // 32 * 32, "max_position_embeddings": BLOCK}
        return {"model_type": kind, "vocab_size": vocabulary} | sides

    return min((made(width) for width in range(32, 8192, 32)), key=lambda each: abs(sizes(each)[0] - wanted))


def sizes(architecture: dict[str, Any]) -> tuple[int, int]:
    """Parameters in all, and of the largest unit that FSDP2 gathers: a layer, or all that is outside of layers."""
    if architecture["model_type"] == "gpt2":
        width, layers = architecture["n_embd"], architecture["n_layer"]
        layer = 12 * width**2 + 13 * width
        rest = (architecture["vocab_size"] + architecture["n_positions"] + 2) * width  # embeddings and head are one
    else:
        width, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
        layer = 4 * width**2 + 3 * width * architecture["intermediate_size"] + 2 * width
        rest = (2 * architecture["vocab_size"] + 1) * width
    return layers * layer + rest, max(layer, rest)


def documents(folder: Path) -> dict[str, str]:
    """A little text to train on and less to validate on; the settings that name them."""
    text = Path(argparse.__file__).read_text("utf-8")
    (folder / "train.txt").write_text(text[:60_000], "utf-8")
    (folder / "validation.txt").write_text(text[60_000:61_500], "utf-8")
    return {
        "data.source": "files",
        "data.files": json.dumps([str(folder / "train.txt")]),
        "data.validation_files": json.dumps([str(folder / "validation.txt")]),
        "data.cache_dir": str(folder / "cache"),
        "data.block_size": str(BLOCK),
    }


def make(architecture: dict[str, Any], text: str, folder: str) -> None:
    """Put a model with random weights, and a tokenizer, into a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from train_loop.data import tokenizer

    tokenizer.train(iter([Path(text).read_text("utf-8")]), 512).save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    model.save_pretrained(folder)


def command(given: argparse.Namespace, folder: Path, architecture: dict[str, Any]) -> list[str]:
    """The command that launches the run, whose data has been prepared."""
    settings = documents(folder) | {
        "run.output_dir": str(folder / "run"),
        "batch.sequences_per_step": str(given.processes * given.micro_batches),
        "batch.micro_batch_size": "1",
        "train.max_steps": str(STEPS),
        "evaluation.every": str(STEPS // 2),
        "checkpoint.every": str(STEPS // 2),
        "sample.max_new_tokens": "4",
    }
    if given.pretrained:
        model = str(folder / "pretrained")
        subprocess.run(
            [sys.executable, __file__, "--make", json.dumps(architecture), str(folder / "train.txt"), model],
            check=True,
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        settings["model.name_or_path"] = model
    else:
        settings |= {"model.architecture": json.dumps(architecture), "tokenizer.train_vocab_size": "512"}
    settings |= dict(each.split("=", 1) for each in given.set)
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    subprocess.run(
        [sys.executable, "-m", "train_loop", "prepare", *arguments],
        check=True,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    config = ROOT / "configs" / "accelerate" / {"fsdp2": "fsdp2.yaml", "ddp": "cpu.yaml"}[given.sharding]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    launch += ["--num_processes", str(given.processes)]
    return [sys.executable, *launch, __file__, "--worker", given.sharding, str(folder), "train", *arguments]


def environment() -> dict[str, str]:
    """Of all processes: this checkout's train_loop, on the CPU, without the Hub."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


# ---------------------------------------------------------------------------------------------------------------------
# In each process of the run


class Marks:
    """Notes what this process is doing, whenever that changes: time and phase, a line each."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # lasts as long as the process
        self._inside: list[str] = []
        self._writing = False
        self._now = ""
        self.note()

    def note(self) -> None:
        """Note what it is doing now, if that is something else than before."""
        phase = self._inside[-1] if self._inside else "imports" if self._now in ("", "imports") else "rest"
        phase = "saving" if self._writing and phase == "training" else phase
        if phase != self._now:
            self._now = phase
            self._file.write(f"{time.monotonic()} {phase}\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The phase of the main thread."""
        self._inside.append(name)
        self.note()
        try:
            yield
        finally:
            self._inside.pop()
            self.note()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Writing, in whichever thread."""
        self._writing = True
        self.note()
        try:
            yield
        finally:
            self._writing = False
            self.note()


def work(sharding: str, folder: str, arguments: list[str]) -> None:
    """Be a process of the run."""
    marks = Marks(Path(folder) / f"phases.{os.environ['RANK']}")
    sys.path.insert(0, str(ROOT / "scripts"))
    if sharding == "fsdp2":
        from gpu_day.launched import shard_on_cpu

        shard_on_cpu()
    from train_loop import cli

    for module, name, phase in MARKED:
        _within(module, name, partial(marks.phase, phase))
    _within(*WRITES, marks.writing)
    sys.exit(cli.main(arguments))


def _within(module: str, name: str, context: Callable[[], Any]) -> None:
    """Have a function of a module, or a method of a class there, run within a context."""
    *classes, last = name.split(".")
    owner: Any = import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    function = getattr(owner, last)

    def marked(*arguments: Any, **named: Any) -> Any:
        with context():
            return function(*arguments, **named)

    setattr(owner, last, marked)


# ---------------------------------------------------------------------------------------------------------------------
# Outside


class Watch:
    """Samples the memory of a launcher's processes.

    Attributes:
        samples: by process ("0", "1", ..., "verification"), each (seconds, anonymous, RSS, kernel's peak) in bytes.
        shared: by process, each (seconds, PSS).
        first_step: when the first step was in the log, in seconds of the common clock.
    """

    def __init__(self, launcher: subprocess.Popen[bytes], log: Path) -> None:
        self.samples: dict[str, list[tuple[float, int, int, int]]] = {}
        self.shared: dict[str, list[tuple[float, int]]] = {}
        self.first_step: float | None = None
        self._launcher, self._log = launcher, log
        self._processes: dict[int, str] = {}

    def watch(self) -> int:
        """Look until the launcher has ended; its exit code."""
        looked = 0.0
        slow = threading.Thread(target=self._slow)
        slow.start()
        while self._launcher.poll() is None:
            now = time.monotonic()
            if now - looked > 10 * PAUSE_SECONDS:
                looked = now
                self._find()
                if self.first_step is None and self._log.exists() and self._log.stat().st_size:
                    self.first_step = now
            for pid, name in list(self._processes.items()):
                with suppress(OSError, KeyError):
                    told = _kilobytes(Path(f"/proc/{pid}/status"))
                    anonymous = 1024 * (told["RssAnon"] + told["RssShmem"])
                    sample = (time.monotonic(), anonymous, 1024 * told["VmRSS"], 1024 * told["VmHWM"])
                    self.samples.setdefault(name, []).append(sample)
            time.sleep(PAUSE_SECONDS)
        slow.join()
        return self._launcher.returncode

    def _slow(self) -> None:
        """PSS, which makes the kernel go through all pages of a process."""
        while self._launcher.poll() is None:
            for pid, name in list(self._processes.items()):
                with suppress(OSError, KeyError):
                    pss = 1024 * _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))["Pss"]
                    self.shared.setdefault(name, []).append((time.monotonic(), pss))
            time.sleep(SLOW_PAUSE_SECONDS)

    def _find(self) -> None:
        """The launcher's own children are the run's processes; a child of theirs verifies."""
        for pid in _children(self._launcher.pid):
            with suppress(OSError):
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                if rank is not None:
                    self._processes.setdefault(pid, rank[1].decode())
        for pid in [each for each, name in self._processes.items() if name != MAPPED]:
            for child in _children(pid):
                with suppress(OSError):
                    if VERIFIER.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                        self._processes.setdefault(child, MAPPED)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for each in Path(f"/proc/{pid}/task").iterdir():  # whichever thread started them
            found += map(int, (each / "children").read_text().split())
    return found


def _kilobytes(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}


def measure(given: argparse.Namespace) -> None:
    """Start a run, watch it, and print what was seen."""
    architecture = shape(given.shape, given.parameters)
    total, unit = sizes(architecture)
    with tempfile.TemporaryDirectory(prefix="bench-sharded-") as scratch:
        folder = Path(scratch)
        launched = command(given, folder, architecture)
        log = folder / "log"
        with log.open("wb") as printed:
            began = time.monotonic()
            process = subprocess.Popen(launched, env=environment(), stdout=printed, stderr=subprocess.STDOUT)
            try:
                watch = Watch(process, folder / "run" / "metrics.jsonl")
                code = watch.watch()
            finally:
                process.terminate()
                process.wait()
        ended = time.monotonic()
        said = log.read_text("utf-8", "replace")
        sheet = json.loads((folder / "run" / "truth.json").read_text()) if not code else {}
        phases = {path.suffix[1:]: marks(path) for path in folder.glob("phases.*")}
    if code:
        sys.exit(f"the run ended with {code}:\n{said[-3000:]}")
    assert sheet["parameters"]["total"] == total, (sheet["parameters"]["total"], total)
    share = total / (given.processes if given.sharding != "ddp" else 1)
    bytes_of = {"weights": 4 * share, "gradients": 4 * share, "moments": 8 * share, "saved copy": 12 * share}
    bound = 1.25 * sum(bytes_of.values()) + 4 * unit + 0.6e9
    found = {
        "shape": given.shape,
        "parameters": total,
        "from": "a folder" if given.pretrained else "scratch",
        "parallelism": sheet["processes"]["parallelism"],
        "processes": given.processes,
        "micro_batches": given.micro_batches,
        "settings": given.set,
        "share_bytes": {name: round(each) for name, each in bytes_of.items()},
        "largest_unit_bytes": 4 * unit,
        "bound_bytes": round(bound),
        "seconds_to_first_step": None if watch.first_step is None else round(watch.first_step - began, 2),
        "seconds": round(ended - began, 2),
        "peaks": {name: _peaks(watch, name, bound) for name in sorted(watch.samples)},
        "phases": {name: _by_phase(watch.samples[name], each) for name, each in sorted(phases.items())},
    }
    if given.json:
        print(json.dumps(found))
    else:
        table(found, given.phases)


def marks(path: Path) -> list[tuple[float, str]]:
    """When each phase of a process began."""
    lines = (line.split(" ", 1) for line in path.read_text("utf-8").splitlines())
    return [(float(when), phase) for when, phase in lines]


def _peaks(watch: Watch, name: str, bound: float) -> dict[str, Any]:
    _, anonymous, resident, kernel = (max(each) for each in zip(*watch.samples[name], strict=True))
    shared = max((pss for _, pss in watch.shared.get(name, [])), default=None)
    peaks = {"anonymous": anonymous, "rss": resident, "rss_kernel": kernel, "pss": shared}
    return peaks | {"of_bound": round(anonymous / bound, 3), "within": anonymous <= bound}


def _by_phase(samples: list[tuple[float, int, int, int]], begun: list[tuple[float, str]]) -> dict[str, Any]:
    """Peak anonymous memory and RSS by phase, and how long the phase took in all."""
    found: dict[str, Any] = {}
    ends = [when for when, _ in begun[1:]] + [samples[-1][0]]
    for (start, phase), end in zip(begun, ends, strict=True):
        within = [each for each in samples if start <= each[0] < end]
        known = found.setdefault(phase, {"anonymous": 0, "rss": 0, "seconds": 0.0})
        known["anonymous"] = max([known["anonymous"], *(each[1] for each in within)])
        known["rss"] = max([known["rss"], *(each[2] for each in within)])
        known["seconds"] = round(known["seconds"] + end - start, 3)
    return {phase: found[phase] for phase in PHASES if phase in found}


def table(found: dict[str, Any], phases: bool) -> None:
    """Print tables; all in GB."""
    gigabytes = "{:.2f}".format
    share = {name: gigabytes(each / 1e9) for name, each in found["share_bytes"].items()}
    unit, bound = found["largest_unit_bytes"] / 1e9, found["bound_bytes"] / 1e9
    print(
        f"\n{found['shape']} of {found['parameters']:,} parameters from {found['from']}, {found['parallelism']}, "
        f"{found['processes']} processes, {found['micro_batches']} micro-batches each {' '.join(found['settings'])}\n"
        f"first step after {found['seconds_to_first_step']} s, whole run {found['seconds']} s\n"
        f"bound: 1.25 x ({' + '.join(f'{each} {name}' for name, each in share.items())}) + {unit:.2f} one unit "
        f"+ 0.6 = {bound:.2f} GB\n"
    )
    print(f"{'peaks in GB, process':22} {'anonymous':>10} {'of bound':>9} {'RSS':>7} {'kernel':>7} {'PSS':>7}")
    for name, peak in found["peaks"].items():
        numbers = [peak[each] for each in ("anonymous", "rss", "rss_kernel", "pss")]
        anonymous, *rest = ("-" if each is None else gigabytes(each / 1e9) for each in numbers)
        print(f"{name:22} {anonymous:>10} {peak['of_bound']:9.2f} " + " ".join(f"{each:>7}" for each in rest))
    if not phases:
        return
    heads = "".join(f"{'process ' + name:>12}" for name in found["phases"])
    print(f"\n{'anonymous, by phase':22}{heads}{'seconds':>12}")
    for phase in PHASES:
        seen = [each.get(phase) for each in found["phases"].values()]
        if any(seen):
            peaks = ["-" if each is None else gigabytes(each["anonymous"] / 1e9) for each in seen]
            seconds = max(each["seconds"] for each in seen if each)
            print(f"{phase:22}" + "".join(f"{peak:>12}" for peak in peaks) + f"{seconds:12.1f}")


if __name__ == "__main__":
    main()
