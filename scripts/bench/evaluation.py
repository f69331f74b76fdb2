"""Evaluation's tokens per second against a forward pass, and its memory by size of the vocabulary.

    python scripts/bench/evaluation.py [--layers 6] [--rounds 5] [--json]

DistilGPT2's shape in fp32, 8 x 128 tokens a batch. The rival is Transformers' forward pass without gradients, whose
logits are dropped at once: it sums up nothing, and nobody knows from it how good the model is. It is timed both as
Transformers multiplies and with the matrix products that train_loop uses (--layers 0 leaves all of this out). Memory is
the process's peak beyond what it had before, weights among it, in evaluating a Llama of width 512 with 4,096, 32,768
and 131,072 tokens in its vocabulary; each in a process of its own.
"""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report, seconds

SEQUENCES, BLOCK = 8, 128
VOCABULARIES = (4096, 32768, 131072)
WAYS = ("evaluation", "forward pass, logits dropped")


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--layers", type=int, default=6, help="of the model that is timed (6)")
    options.add_argument("--memory_of", nargs=2, metavar=("WAY", "VOCABULARY"), help="what a process started here is")
    given = options.parse_args()
    if given.memory_of:
        way, vocabulary = given.memory_of
        print(_memory_of(way, int(vocabulary)))
        return
    if given.layers:
        _speed(given.layers, given.rounds, given.json)
    rows = {way: {each: _in_a_process(way, each) for each in VOCABULARIES} for way in WAYS}
    if given.json:
        print(json.dumps({"peak_mb": rows}))
        return
    print(f"\nPeak memory beyond the model, {SEQUENCES} x {BLOCK} tokens, MB\n")
    print(f"{'vocabulary':44}" + "".join(f"{each:>10,}" for each in VOCABULARIES))
    for way, found in rows.items():
        print(f"{way:44}" + "".join(f"{found[each]:10.1f}" for each in VOCABULARIES))


def _speed(layers: int, rounds: int, as_json: bool) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from train_loop.models import building
    from train_loop.ops import cpu
    from train_loop.training.objective import Objective

    cpu.keep_freed_memory()  # for all of them
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    mine = copy.deepcopy(theirs)
    building.fuse_activations(mine)
    cpu.use_products(mine)
    objective = Objective(mine).eval()
    ids = torch.randint(0, theirs.config.vocab_size, (SEQUENCES, BLOCK))
    targets = ids.roll(-1, 1)

    @torch.no_grad()
    def forward(of: Any) -> None:
        of(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def evaluate() -> None:
        objective(ids, targets, statistics=True)

    contenders = [
        Contender(WAYS[1], lambda: seconds(lambda: forward(theirs))),
        Contender("... with train_loop's matrix products", lambda: seconds(lambda: forward(mine))),
        Contender(WAYS[0], lambda: seconds(evaluate)),
    ]
    found = alternate(contenders, rounds)
    report(f"evaluation, {layers} layers, {SEQUENCES} x {BLOCK}", found, SEQUENCES * BLOCK, "tokens", as_json)


def _in_a_process(way: str, vocabulary: int) -> float:
    command = [sys.executable, __file__, "--memory_of", way, str(vocabulary)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _memory_of(way: str, vocabulary: int) -> float:
    """Peak of this process's resident memory, in MB, beyond what it was before."""
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from train_loop.ops import cpu
        from train_loop.training.objective import Objective

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
        sizes["num_attention_heads"] = 8
        language_model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes)).eval()
        objective = Objective(language_model).eval()
        if way == WAYS[0]:
            cpu.use_products(language_model)

        @torch.no_grad()
        def work(rows: int, columns: int) -> None:
            ids = torch.randint(0, vocabulary, (rows, columns))
            if way == WAYS[0]:
                objective(ids, ids, statistics=True)
            else:
                language_model(input_ids=ids, use_cache=False)

        work(1, 2)  # what is allocated once
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        before = _resident("VmRSS")
        for _ in range(3):
            work(SEQUENCES, BLOCK)
        return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """VmRSS or VmHWM, the peak, of this process, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
