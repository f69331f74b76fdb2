"""Peak memory of preparing, from little text to much, in many documents and in a single one.

    python scripts/bench/prepare_memory.py [--megabytes 10 100 1000] [--forms many one row] [--json]

The text is made of the words of the standard library's sources, drawn as often as they occur there: many documents in
a .jsonl, one document that is a .txt, or (only if asked for) one that is a row of a .jsonl. Each is prepared in a
process of its own with a tokenizer of 4,096 entries that another one trained; memory is the process's peak beyond what
it had when it began to prepare. Once more is the same command again, which finds the store.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import parser

WORDS_A_LINE, LINES_A_DOCUMENT = 12, 60
FORMS = {"many": "text.jsonl", "one": "text.txt", "row": "row.jsonl"}


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="of text (10 100 1000)")
    options.add_argument(
        "--forms", nargs="+", choices=[*FORMS], default=["many", "one"], help="of documents (many one)"
    )
    options.add_argument(
        "--prepare", nargs=2, metavar=("FILE", "CACHE"), help="what a process started by this one does"
    )
    given = options.parse_args()
    if given.prepare:
        print(json.dumps(prepare(*given.prepare)))
        return
    rows = []
    for megabytes, form in itertools.product(given.megabytes, given.forms):
        with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
            train(folder)
            path = Path(folder) / FORMS[form]
            write(path, megabytes * 1_000_000, form)
            command = [sys.executable, __file__, "--prepare", str(path), folder]
            first, again = (
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2)
            )
        of = {"many": f"{first['documents']:,} documents", "one": "one document", "row": "one row"}[form]
        rows.append({"name": f"{megabytes:,} MB in {of}", **first, "again_seconds": again["seconds"]})
    if given.json:
        print(json.dumps(rows))
        return
    print(f"\n{'':36} {'seconds':>9} {'MB/s':>7} {'peak MB':>9} {'once more, s':>13}")
    for row in rows:
        rate = row["bytes"] / 1e6 / row["seconds"]
        print(f"{row['name']:36} {row['seconds']:9.1f} {rate:7.2f} {row['peak_mb']:9.0f} {row['again_seconds']:13.2f}")


def train(folder: str) -> None:
    """Put a tokenizer of 4,096 entries, trained on the standard library's sources, into a folder."""
    from train_loop.config.schema import Config
    from train_loop.data import tokenizer
    from train_loop.data.corpus import Corpus

    texts = (document.text for _, document in Corpus(Config().data).splits())
    tokenizer.train(texts, 4096).save_pretrained(folder)


def write(path: Path, size: int, form: str) -> None:
    """A file of about so many bytes of text: many rows, or a single document."""
    from train_loop.data.sources.stdlib import source_files

    words = " ".join(Path(file).read_text("utf-8", "replace") for _, file in source_files()).split()
    draw = random.Random(0)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"text": "' if form == "row" else "")
        while written < size:
            lines = (" ".join(draw.choices(words, k=WORDS_A_LINE)) for _ in range(LINES_A_DOCUMENT))
            text = "\n".join(lines) + "\n"
            quoted = json.dumps(text)
            written += len(text.encode())
            file.write({"many": f'{{"text": {quoted}}}\n', "one": text, "row": quoted[1:-1]}[form])
        file.write('"}\n' if form == "row" else "")


def prepare(path: str, cache: str) -> dict[str, Any]:
    """Prepare a file with the tokenizer of a folder; seconds, peak memory in MB, and what came out."""
    from train_loop.config.schema import Config
    from train_loop.data import preparation, tokenizer

    config = Config()
    trained = tokenizer.load(cache)
    config.data.source, config.data.files, config.data.cache_dir = "files", [path], cache
    if not path.endswith(FORMS["many"]):  # nothing is left to validate on: that is another one
        small = Path(cache) / "small.txt"
        if not small.exists():  # the second run is to find what the first one saw
            small.write_text("A short text to validate on.\n" * 10, "utf-8")
        config.data.validation_files = [str(small)]
    reset_peak()
    before = peak()
    began = time.perf_counter()
    prepared = preparation.prepare(config, trained, shown=False)
    seconds = time.perf_counter() - began
    sides = (prepared.train.ledger, prepared.validation.ledger)
    return {
        "seconds": seconds,
        "peak_mb": peak() - before,
        "documents": sum(side.documents for side in sides),
        "bytes": sum(side.bytes for side in sides),
    }


def reset_peak() -> None:
    """Set the peak memory of this process back to what it has now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The peak memory of this process, in MB. Not `ru_maxrss`, which begins with the memory of the process's parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
