"""What one process of W does in a step, an evaluation, a checkpoint and at the start, at 1 to 1,024 processes.

    python scripts/bench/scaling.py [--sizes 1 8 64 1024] [--tokens 1000000000000] [--sequences 8192] [--json]

No process is started: the real code runs as rank 0, as a middle one and as the last one of W, and the dearest of the
three counts. The store is a sparse file of so many tokens; what the other ranks would send is made up. Each cell has
the amount of the work (blocks, bytes, values: they are counted, so they are the same on any machine) and its
milliseconds (the least of three times). `grows` says why, where an amount grows with the number of processes.
"""

import argparse
import itertools
import json
import pickle
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import seconds

BLOCK, STEPS, ROUNDS = 512, 4, 3
EVALUATED = 1 << 14  # windows of validation data
DOCUMENTS = 200
STATE = 1 << 24  # bytes of weights, and as many of each moment
Work = Callable[[int, int], int]  # of a rank of so many: does it once, and returns how much it was


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the benchmark, print its table, and return it."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64, 1024], help="numbers of processes")
    options.add_argument("--tokens", type=int, default=10**12, help="of the store (a sparse file)")
    options.add_argument("--sequences", type=int, default=8192, help="per step, eight a micro-batch at most")
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = options.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="bench-scaling-"))
    try:
        rows = [_measured(row, given.sizes) for row in _rows(scratch, given.tokens, given.sequences)]
    finally:
        shutil.rmtree(scratch)
    if given.json:
        print(json.dumps(rows))
    else:
        _print(rows, given.sizes)
    return rows


def _rows(scratch: Path, tokens: int, sequences: int) -> Iterator[tuple[str, str, str, str, Work]]:
    """What is measured: per what, what, in which unit, why it grows (or nothing), and the work."""
    yield from _of_a_step(scratch, tokens, sequences)
    yield from _of_watching(scratch)
    yield from _of_a_checkpoint(scratch)
    yield from _of_an_evaluation(scratch)
    yield from _of_the_start(scratch, tokens)


def _of_a_step(scratch: Path, tokens: int, sequences: int) -> Iterator[tuple[str, str, str, str, Work]]:
    from train_loop.data.order import Plan, cut
    from train_loop.training.state import StepBatches
    from train_loop.training.step import reduce_scalars

    windows = _windows(scratch / "train", tokens)

    def plan(world: int) -> Plan:
        return Plan(len(windows), sequences, max(1, min(8, sequences // world)), 0)

    def order(rank: int, world: int) -> int:
        blocks = next(plan(world).steps(1000, 1001))
        windows.targets(blocks)
        cut(blocks, plan(world).micro_batch_size, rank, world)
        return len(blocks)

    def load(rank: int, world: int) -> int:
        batches = StepBatches(windows, plan(world), STEPS, rank, world).after(STEPS - 1)
        return sum(len(batch.inputs) for batch in next(batches).micro_batches) * (BLOCK + 1) * 2

    def losses(rank: int, world: int) -> int:
        size = plan(world).micro_batch_size
        rounds = -(-sequences // (size * world))
        accelerator = SimpleNamespace(num_processes=world, gather=lambda own: own.repeat(world, 1))
        context: Any = SimpleNamespace(
            accelerator=accelerator, stop=SimpleNamespace(asked=False), clock=lambda part: nullcontext()
        )
        reduce_scalars(context, list(torch.rand(rounds)), torch.tensor(1.0))
        return (rounds + 2) * world

    whole = "the ids of a step's blocks: all of them, to count its targets; not with the processes"
    yield "step", f"order ({whole})", "blocks", "", order
    yield "step", "loader (what this process reads)", "bytes", "", load
    yield (
        *("step", "losses, gathered", "values"),
        "a loss for each micro-batch of the step, added up exactly; a norm and a wish to stop from each process",
        losses,
    )


def _of_watching(scratch: Path) -> Iterator[tuple[str, str, str, str, Work]]:
    from train_loop.distributed.heartbeat import Heartbeat
    from train_loop.metrics.log import EventFile

    log = EventFile(scratch / "metrics.jsonl", 0)
    line = {"event": "step", "step": 1, **{f"value {number}": number / 3 for number in range(16)}}

    def write(rank: int, world: int) -> int:
        if rank == 0:
            log.append(line)
        return len(json.dumps(line)) + 1 if rank == 0 else 0

    def listen(rank: int, world: int) -> int:
        store = torch.distributed.HashStore()
        keys = [f"alive/{process}" for process in range(world)]
        for key in keys:
            store.set(key, "1000 1000000")
        beat: Any = object.__new__(Heartbeat)
        with mock.patch("train_loop.distributed.heartbeat.Preflight"), mock.patch.dict("os.environ", _launched(world)):
            beat.__init__(SimpleNamespace(preflight_timeout_seconds=50, timeout_seconds=600), {})
        beat._texts, beat._heard = [""] * world, [0.0] * world
        texts = [text.decode() for text in store.multi_get(keys)] if world > 1 else []
        if world > 1:
            beat._silent = lambda patience: None
            beat._take_in(texts)
        return int(len(texts) / (beat._interval if world > 1 else 1))  # in a second

    yield "step", "log (the first process)", "bytes", "", write
    watched = "each process watches all others, at most 64 of them a second: the more there are, the rarer"
    yield "second", "heartbeats read", "values", watched, listen


def _of_a_checkpoint(scratch: Path) -> Iterator[tuple[str, str, str, str, Work]]:
    from train_loop.checkpoint.storage import Shard, write_part

    width = 256
    whole = STATE // 4 // width

    def part(rank: int, world: int) -> int:
        rows = -(-whole // world)
        own = torch.zeros(max(0, min(rows, whole - rank * rows)), width)
        held = {"model": {"w": Shard(own, rank * rows, whole)}, "optimizer": {"m": Shard(own + 1), "v": Shard(own + 2)}}
        folder = Path(tempfile.mkdtemp(dir=scratch))
        sums = write_part(folder, rank, world, held)
        shutil.rmtree(folder)
        return sum(each["bytes"] for each in sums.values())

    def exchange(rank: int, world: int) -> int:
        sums = {f"model-{part:05d}-of-{world:05d}.safetensors": {"bytes": 1, "sha256": 64 * "0"} for part in range(2)}
        return len(pickle.dumps(sums)) * world if rank == 0 else 0

    yield "checkpoint", "written and hashed, FSDP2", "bytes", "", part
    every = "the first process writes the manifest, which names each process's files"
    yield "checkpoint", "checksums, FSDP2 (the first process)", "bytes", every, exchange


def _of_an_evaluation(scratch: Path) -> Iterator[tuple[str, str, str, str, Work]]:
    from train_loop.data.loader import loader
    from train_loop.data.order import cut

    windows = _windows(scratch / "validation", EVALUATED * BLOCK)

    def read(rank: int, world: int) -> int:
        batches = cut(np.arange(len(windows)), 8, rank, world)
        return sum(len(batch.inputs) for batch in loader(windows, batches))

    def sums(rank: int, world: int) -> int:
        from train_loop.distributed.collectives import exact_parts

        rows = -(-EVALUATED // (8 * world))
        return world * sum(len(exact_parts(torch.rand(rows, dtype=torch.float64).tolist())) for _ in range(3))

    yield "evaluation", "its share of the validation data", "blocks", "", read
    exactly = "each process sends three sums, each in the few numbers that hold it exactly"
    yield "evaluation", "sums, gathered", "values", exactly, sums


def _of_the_start(scratch: Path, tokens: int) -> Iterator[tuple[str, str, str, str, Work]]:
    from accelerate import Accelerator

    from train_loop.data import content, preparation
    from train_loop.distributed import collectives

    def opened(rank: int, world: int) -> int:
        tracemalloc.start()
        windows = _windows(scratch / "train", tokens)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(windows) == -(-(tokens - 1) // BLOCK)
        return held // 10**5  # in tenths of a megabyte: what Python itself needs varies

    def agree(rank: int, world: int) -> int:
        sent = []

        def gather(rows: list[Any]) -> list[Any]:
            sent.append(len(pickle.dumps(rows)) * world)
            return rows * world

        accelerator: Any = SimpleNamespace(num_processes=world, device=Accelerator(cpu=True).device, process_index=rank)
        with mock.patch.object(collectives, "gather_object", gather):
            collectives.check_same(accelerator, "the data", 64 * "0", "")
            collectives.check_same(accelerator, "the initial weights' digest", 64 * "0", "")
            collectives.describe_ranks(accelerator)
        return sum(sent)

    def find(rank: int, world: int) -> int:
        with mock.patch.object(content, "_look", wraps=content._look) as look:
            preparation.prepare(config, shown=False)
        return look.call_count

    config = _small_data(scratch)
    preparation.prepare(config, shown=False)
    yield "start", f"prepared data, found again ({DOCUMENTS} documents)", "files", "", find
    yield "start", "memory of the opened store (0.1 MB)", "values", "", opened
    names = "what differs is named with its process and host, and the truth sheet lists all processes"
    yield "start", "agreement on data and weights; the list of processes", "bytes", names, agree


@contextmanager
def _sparse(path: Path, size: int) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(size)
    yield path


def _windows(folder: Path, tokens: int) -> Any:
    """The windows of a store of so many tokens, all of them 0 and none of them on disk."""
    from train_loop.data.loader import Windows
    from train_loop.data.token_store import Ledger, TokenStore

    with _sparse(folder / "tokens.bin", 2 * tokens):
        return Windows(TokenStore(folder, np.uint16, Ledger(text_tokens=tokens)), BLOCK, 0)


def _small_data(scratch: Path) -> Any:
    """A configuration of a few small documents, in files of their own."""
    from train_loop.config.schema import Config

    config = Config()
    config.data.source, config.data.files = "files", [str(scratch / "documents" / "*.txt")]
    config.data.cache_dir, config.tokenizer.train_vocab_size = str(scratch / "cache"), 260
    (scratch / "documents").mkdir()
    for number in range(DOCUMENTS):
        (scratch / "documents" / f"{number}.txt").write_text(f"{number} words in one document of many. " * 20)
    return config


def _launched(world: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(world), "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def _measured(row: tuple[str, str, str, str, Work], sizes: list[int]) -> dict[str, Any]:
    """A row of the table: the dearest of three ranks at each size."""
    per, what, unit, why, work = row
    cells = {}
    for world in sizes:
        ranks = sorted({0, world // 2, world - 1})
        amount = max(work(rank, world) for rank in ranks)
        once = (partial(work, rank, world) for rank in ranks)
        least = (min(seconds(each) for _ in range(ROUNDS)) for each in once)
        cells[str(world)] = {"amount": amount, "ms": round(1e3 * max(least), 3)}
    return {"per": per, "what": what, "unit": unit, "grows": why, "processes": cells}


def _print(rows: list[dict[str, Any]], sizes: list[int]) -> None:
    print(f"{'per':11} {'what one process does':58} {'unit':7}" + "".join(f"{size:>21,}" for size in sizes))
    for row in rows:
        cells = [row["processes"][str(size)] for size in sizes]
        shown = "".join(f"{cell['amount']:>12,} {cell['ms']:>6.2f} ms"[:21].rjust(21) for cell in cells)
        print(f"{row['per']:11} {row['what'].split(' (the ids')[0]:58} {row['unit']:7}{shown}")
    for row in itertools.compress(rows, (row["grows"] for row in rows)):
        print(f"  {row['what']}: {row['grows']}")


if __name__ == "__main__":
    main()
