"""How fast documents become a token store, against the raw tokenizer and the guide's two `map` calls.

    python scripts/bench/prepare.py [--tokenizer FOLDER] [--rounds 5] [--json]

The bound is `encode_batch_fast` of the Rust tokenizer on all documents at once, already in memory, results dropped.
Preparing also reads the files, makes arrays of the ids, compresses the held-out documents, keeps the books, and writes
and syncs the store. The rival is the "Causal language modeling" guide: tokenize and group with two `Dataset.map`.
"""

import logging
import os
import shutil
import tempfile
from itertools import chain
from typing import Any

from measure import Contender, alternate, parser, report, seconds

os.environ["TOKENIZERS_PARALLELISM"] = "true"


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--tokenizer", help="folder of a tokenizer; by default one is trained (4,096 entries)")
    given = options.parse_args()

    import datasets

    from train_loop.config import Config
    from train_loop.data import store, tokenizer
    from train_loop.data.corpus import Corpus

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    config = Config()
    config.data.block_size = 128
    texts = [document.text for _, document in Corpus(config.data).sides()]
    trained = tokenizer.load(given.tokenizer) if given.tokenizer else tokenizer.train(texts, 4096)
    core = tokenizer.encoder(trained)
    table = datasets.Dataset.from_dict({"text": texts})

    def prepare() -> float:
        config.data.cache_dir = tempfile.mkdtemp(prefix="bench-prepare-")
        try:
            return seconds(lambda: store.prepare(config, trained, shown=False))
        finally:
            shutil.rmtree(config.data.cache_dir)

    def guide() -> None:
        def tokenize(rows: dict[str, Any]) -> Any:
            return trained(rows["text"])

        def group(rows: dict[str, Any]) -> dict[str, Any]:
            joined = {name: list(chain(*rows[name])) for name in rows}
            length = len(joined["input_ids"]) // 128 * 128
            cut = {name: [ids[i : i + 128] for i in range(0, length, 128)] for name, ids in joined.items()}
            return cut | {"labels": cut["input_ids"].copy()}

        tokenized = table.map(tokenize, batched=True, remove_columns=["text"], load_from_cache_file=False)
        tokenized.map(group, batched=True, load_from_cache_file=False)

    contenders = [
        Contender(
            "encode_batch_fast alone (the bound)",
            lambda: seconds(lambda: core.encode_batch_fast(texts, add_special_tokens=False)),
        ),
        Contender("train_loop: documents to store", prepare),
        Contender("the guide: two Dataset.map calls", lambda: seconds(guide)),
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    title = f"Preparing {megabytes:.1f} MB in {len(texts)} documents"
    report(title, alternate(contenders, given.rounds), megabytes, "MB", given.json)


if __name__ == "__main__":
    main()
