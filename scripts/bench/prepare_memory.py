"""Peak memory of preparing, from little text to much, in many documents and in a single one.

    python scripts/bench/prepare_memory.py [--megabytes 10 100 1000] [--json]

The text is made of the words of the standard library's sources, drawn as often as they occur there. Each size is
prepared in a process of its own; memory is the process's peak beyond what it had when it began to prepare. Once more
is the same command again, which finds the store.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import parser

WORDS_A_LINE, LINES_A_DOCUMENT = 12, 60


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="of text (10 100 1000)")
    options.add_argument(
        "--prepare", nargs=2, metavar=("FILE", "CACHE"), help="what a process started by this one does"
    )
    given = options.parse_args()
    if given.prepare:
        print(json.dumps(prepare(*given.prepare)))
        return
    rows = []
    for megabytes in given.megabytes:
        for single in (False, True):
            with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
                path = Path(folder) / ("text.txt" if single else "text.jsonl")
                write(path, megabytes * 1_000_000)
                command = [sys.executable, __file__, "--prepare", str(path), folder]
                first, again = (
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    for _ in range(2)
                )
            name = f"{megabytes:,} MB in " + ("one document" if single else f"{first['documents']:,} documents")
            rows.append({"name": name, **first, "again_seconds": again["seconds"]})
    if given.json:
        print(json.dumps(rows))
        return
    print(f"\n{'':36} {'seconds':>9} {'MB/s':>7} {'peak MB':>9} {'once more, s':>13}")
    for row in rows:
        rate = row["bytes"] / 1e6 / row["seconds"]
        print(f"{row['name']:36} {row['seconds']:9.1f} {rate:7.2f} {row['peak_mb']:9.0f} {row['again_seconds']:13.2f}")


def write(path: Path, size: int) -> None:
    """A file of about so many bytes: .jsonl, a document a line, or .txt, all of it one document."""
    from train_loop.data.corpus import stdlib_files

    words = " ".join(Path(file).read_text("utf-8", "replace") for _, file in stdlib_files()).split()
    draw = random.Random(0)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            lines = (" ".join(draw.choices(words, k=WORDS_A_LINE)) for _ in range(LINES_A_DOCUMENT))
            text = "\n".join(lines) + "\n"
            written += file.write(text if path.suffix == ".txt" else json.dumps({"text": text}) + "\n")


def prepare(path: str, cache: str) -> dict[str, Any]:
    """Prepare a file with a tokenizer of 4,096 entries; seconds, peak memory in MB, and what came out."""
    from train_loop.config import Config
    from train_loop.data import store, tokenizer
    from train_loop.data.corpus import Corpus

    config = Config()
    trained = tokenizer.train((document.text for _, document in Corpus(config.data).sides()), 4096)
    config.data.source, config.data.files, config.data.cache_dir = "files", [path], cache
    if path.endswith(".txt"):  # nothing is left to validate on: that is another one
        small = Path(cache) / "small.txt"
        if not small.exists():  # the second run is to find what the first one saw
            small.write_text("A short text to validate on.\n" * 10, "utf-8")
        config.data.validation_files = [str(small)]
    before = resident()
    began = time.perf_counter()
    prepared = store.prepare(config, trained, shown=False)
    seconds = time.perf_counter() - began
    sides = (prepared.train.ledger, prepared.validation.ledger)
    return {
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "documents": sum(side.documents for side in sides),
        "bytes": sum(side.bytes for side in sides),
    }


def resident() -> float:
    """The memory of this process now, in MB (Linux), its peak so far set back to that."""
    Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
