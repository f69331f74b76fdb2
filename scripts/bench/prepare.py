"""How fast documents become a token store, against the raw tokenizer, and against Transformers' own ways to prepare.

    python scripts/bench/prepare.py [--tokenizer FOLDER] [--short] [--alone] [--rounds 5] [--json]

The documents are the sources of Python's standard library; `--short` cuts them after the first line that ends beyond
1,000 characters, about the length of the answers that Transformers' guide trains on. The bound is `encode_batch_fast`
of the Rust tokenizer on all documents at once, already in memory, results dropped. Preparing also reads the files (with
`--short` one .jsonl), makes arrays of the ids, compresses the held-out documents, keeps the books, and writes and syncs
the store. The bound itself is slower where the rivals run in between: `--alone` leaves them out.

The rivals get the documents as a `Dataset` on disk, and write theirs beside it, with nothing compressed or synced:

- the "Causal language modeling" guide: two `Dataset.map` of four processes each, lists joined by `sum(lists, [])`;
- the same in one process, where the tokenizer has all cores: a machine of few cores may do better so;
- `run_clm.py`: in one process by default, lists joined by `itertools.chain`.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report, seconds

os.environ["TOKENIZERS_PARALLELISM"] = "true"
BLOCK_SIZE, SHORT = 128, 1000


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--tokenizer", help="folder of a tokenizer; by default one is trained (4,096 entries)")
    options.add_argument("--short", action="store_true", help="documents of about 1,000 characters")
    options.add_argument("--alone", action="store_true", help="without the rivals")
    given = options.parse_args()

    import datasets

    from train_loop.config.schema import Config
    from train_loop.data import preparation, tokenizer
    from train_loop.data.corpus import Corpus

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    config = Config()
    config.data.block_size = BLOCK_SIZE
    config.data.cache_dir = str(folder / "cache")
    texts = [document.text for _, document in Corpus(config.data).splits()]
    trained = tokenizer.load(given.tokenizer) if given.tokenizer else tokenizer.train(texts, 4096)
    if given.short:
        texts = [short for text in texts for short in shortened(text)]
        path = folder / "short.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        config.data.source, config.data.files = "files", [str(path)]
    core = tokenizer.encoder(trained)

    def prepare() -> float:
        try:
            return seconds(lambda: preparation.prepare(config, trained, shown=False))
        finally:
            shutil.rmtree(config.data.cache_dir or "")

    def maps(join: Callable[[list[list[int]]], list[int]], processes: int | None) -> float:
        """Tokenize, then group into blocks, each with a `map`."""
        # On disk, as a data set that was loaded is; its folder is fresh, so that nothing is found in a cache.
        rows = Path(tempfile.mkdtemp(dir=folder))
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(rows)
        table = datasets.load_from_disk(rows)

        def tokenize(rows: dict[str, Any]) -> Any:
            return trained(rows["text"])

        def group(rows: dict[str, Any]) -> dict[str, Any]:
            joined = {name: join(rows[name]) for name in rows}
            length = len(joined["input_ids"])
            if length >= BLOCK_SIZE:
                length = length // BLOCK_SIZE * BLOCK_SIZE
            cut = {
                name: [ids[i : i + BLOCK_SIZE] for i in range(0, length, BLOCK_SIZE)] for name, ids in joined.items()
            }
            return cut | {"labels": cut["input_ids"].copy()}

        # A process that is forked has none of the tokenizer's threads.
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes else "true"

        def both() -> None:
            tokenized = table.map(
                tokenize, batched=True, num_proc=processes, remove_columns=["text"], load_from_cache_file=False
            )
            tokenized.map(group, batched=True, num_proc=processes, load_from_cache_file=False)

        try:
            return seconds(both)
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            shutil.rmtree(rows)

    def added(lists: list[list[int]]) -> list[int]:
        return sum(lists, [])  # noqa: RUF017 (quadratic, as the guide has it)

    def chained(lists: list[list[int]]) -> list[int]:
        return list(chain(*lists))

    contenders = [
        Contender(
            "encode_batch_fast alone (the bound)",
            lambda: seconds(lambda: core.encode_batch_fast(texts, add_special_tokens=False)),
        ),
        Contender("train_loop: documents to store", prepare),
    ]
    rivals = [
        Contender("the guide: two maps, 4 processes, sum", lambda: maps(added, 4)),
        Contender("the guide in one process", lambda: maps(added, None)),
        Contender("run_clm.py: one process, chain", lambda: maps(chained, None)),
    ]
    if not given.alone:
        contenders += rivals
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    title = f"Preparing {megabytes:.1f} MB in {len(texts):,} documents"
    try:
        report(title, alternate(contenders, given.rounds), megabytes, "MB", given.json)
    finally:
        shutil.rmtree(folder)


def shortened(text: str) -> list[str]:
    """A text in parts of whole lines, each of about `SHORT` characters."""
    parts, part = [], ""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= SHORT:
            parts.append(part)
            part = ""
    return [*parts, part] if part else parts


if __name__ == "__main__":
    main()
