"""Which of Transformers' causal language models train_loop trains: docs/architectures.md, made by trying each.

    python scripts/architectures.py                     # all of them, a process each; prints the table
    python scripts/architectures.py gpt2 mamba          # these
    python scripts/architectures.py --write             # all of them, into docs/architectures.md

Each type gets a configuration of a few ten thousand weights (`small`) and a run of four steps on made-up text. It is
looked whether its earlier logits move if later tokens change, what of it decays, whether `evaluate` finds the logged
loss again, whether the exported model passes its verification, whether tokens sampled with a cache are those sampled
without, and whether a run that is resumed from step 2 ends in the same bits. Experts are balanced, if it has some.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
COLUMNS = ("train", "causal", "decay", "evaluate", "export", "sample", "resume", "experts")
ENTRIES = 300  # of the vocabulary
SECONDS = 180  # at most, for one type

# The sizes of a small model, by what configurations call them; a smaller default stays.
SIZES: dict[int, str] = {
    1: """first_k_dense_replace moe_num_shared_experts n_group n_shared_experts num_dense_layers num_expert_group
        num_shared_experts topk_group""",
    2: """attention_heads decoder_attention_heads decoder_layers depth encoder_attention_heads encoder_layers
        index_n_heads kv_n_heads linear_num_heads linear_num_key_heads linear_num_value_heads moe_k
        moe_top_k moe_topk n_head n_heads n_layer n_layers num_attention_heads num_blocks num_decoder_attention_heads
        num_decoder_layers num_encoder_attention_heads num_encoder_layers num_experts_per_tok num_experts_per_token
        num_global_layers num_heads num_hidden_layers num_key_value_heads num_kv_heads num_layers num_layers_per_stack
        num_query_groups swa_num_attention_heads swa_num_key_value_heads top_k_experts""",
    4: "mamba_n_heads moe_num_experts n_routed_experts num_experts num_local_experts",
    8: """encoder_hash_byte_group_vocab hidden_size_per_layer_input index_head_dim kv_lora_rank mamba_d_state
        o_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim rotary_dim ssm_state_size state_size""",
    16: """attention_head_size d_head dim_head head_dim kv_channels linear_head_dim linear_key_head_dim
        linear_value_head_dim mamba_d_head swa_head_dim v_head_dim""",
    32: """backbone_hidden_size d_model emb_dim embed_dim embedding_dim embedding_size hidden_size hidden_size_global
        image_embed_dim lru_width n_embd out_hidden_size output_proj_dims projector_input_dim projector_output_dim
        pronunciation_embed_dim shape_embed_dim vision_output_dim word_embed_proj_dim""",
    48: "output_embedding_size",
    64: """d_inner decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim expert_ffn_hidden_size
        feed_forward_size ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp mamba_d_ssm
        moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size""",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
UNSET = {
    "head_dim",
    "moe_intermediate_size",
    "moe_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
}
"""Sizes that some configurations leave open, and that some of them need."""

# What a type needs besides. (Decoders that are encoders by default get `is_decoder` where they have it.)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 32},
    "flint": {"mlp_only_layers": []},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 24, "v_head_dim": 16},
    "prophetnet": {"max_position_embeddings": 64, "pad_token_id": 0},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 16,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
    },
    "reformer": {"axial_pos_embds": False},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}

DRAFTS = "guesses tokens for another model, from that model's hidden states; it takes no text of its own"
NOT_BUILT = "Transformers cannot build a causal model from this type's configuration, only from its decoder's"
REASONS = {
    "dots3_note": "no small configuration of it is known; its text part, `dots3_note_text`, trains",
    "gemma3n": "Transformers needs the package timm for its eyes; its text part, `gemma3n_text`, trains",
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "git": "describes pictures; without one, Transformers' own loss fails",
    "musicgen": NOT_BUILT,
    "musicgen_melody": NOT_BUILT,
}
"""Why types that Transformers itself does not train on text are in the list."""


def types() -> list[str]:
    """All causal language models of Transformers, by model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small(model_type: str, config: Any = None) -> dict[str, Any]:
    """`model.architecture` of a small model: its default configuration, with every size in it that `SIZE` knows."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    nested = config is not None
    config = config or CONFIG_MAPPING[model_type]()
    found: dict[str, Any] = {}
    defaults = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    for name, value in defaults.items():
        part = config.__dict__.get(name)
        if isinstance(part, PreTrainedConfig):
            found[name] = small(part.model_type, part)
        elif name in ("layer_types", "layers_block_type") and isinstance(value, list) and len(set(value)) > 1:
            found[name] = list(dict.fromkeys(value))  # a layer of each kind
            found["num_hidden_layers"] = len(found[name])
        elif nested and name == "vocab_size":
            found[name] = ENTRIES
        elif nested and name.endswith("token_id") and isinstance(value, int) and value >= ENTRIES:
            found[name] = 0
        elif name in SIZE and name not in found:
            if (isinstance(value, int) and value > 0) or (value is None and name in UNSET):
                found[name] = SIZE[name] if value is None or SIZE[name] == 4 else min(value, SIZE[name])
            elif isinstance(value, list) and value and isinstance(value[0], int):
                found[name] = SIZE[name]
    if "qk_rope_head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    if defaults.get("is_decoder") is False:
        found["is_decoder"] = True
    return found | NEEDS.get(model_type, {})


def prepare(folder: Path) -> None:
    """Text and a tokenizer that all types share."""
    from train_loop.data import tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=5 + 5 * number)) for number in range(40)]
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    tokenizer.train(texts, ENTRIES).save_pretrained(folder / "tokenizer")


def attempt(model_type: str, folder: Path, verify: bool = True) -> dict[str, str]:
    """A row of the table: what works, by column, or why the first thing that doesn't does not.

    `folder` has been `prepare`d; the run is made in it.
    """
    try:
        architecture = {"model_type": model_type} | small(model_type)
    except Exception as error:
        return {"train": REASONS.get(model_type) or f"its default configuration fails: {short(error)}"}
    run = folder / model_type
    values = {
        "run.output_dir": run,
        "model.architecture": json.dumps(architecture),
        "tokenizer.name_or_path": folder / "tokenizer",
        "data.source": "files",
        "data.files": folder / "text" / "*.txt",
        "data.cache_dir": folder / "cache",
        "data.block_size": 32,
        "batch.sequences_per_step": 4,
        "optimizer.learning_rate": "3e-3",
        "train.max_steps": 4,
        "checkpoint.every": 2,
        "checkpoint.keep": 9,
        "sample.max_new_tokens": 8,
    }
    settings = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    code, _, err = call("train", *settings, "--export.verify", str(verify).lower())
    exported = "verified" if verify else "yes"
    if code and "exported model" in err:
        exported = "no: " + err.strip().splitlines()[-1].removeprefix("train-loop: ")
        code, _, err = call("train", *settings, "--export.verify", "false")
    if code:
        return {"train": why(architecture, err.replace(f"{run}/", ""))}
    sheet = json.loads((run / "truth.json").read_text(encoding="utf-8"))
    moved = sheet["causality"]["moved"]
    row = {"train": "yes", "causal": f"yes, to {moved:.0e}" if moved else "yes", "decay": decay(sheet["parameters"])}
    return row | {
        "export": exported,
        "evaluate": cell(lambda: evaluated(run, settings)),
        "sample": cell(lambda: sampled(run)),
        "resume": cell(lambda: resumed(run, settings)),
        "experts": cell(lambda: balanced(run, sheet["experts"], settings)),
    }


def call(*command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    from accelerate.state import AcceleratorState

    from train_loop.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(command))
        except Exception as error:
            return 1, out.getvalue(), f"traceback: {short(error)}"
    return code, out.getvalue(), err.getvalue()


def short(error: object) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return (type(error).__name__ + ": " if isinstance(error, Exception) else "") + text[:200]


def why(architecture: dict[str, Any], err: str) -> str:
    """Why a type does not train: because Transformers can't either, or what train_loop says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids, config_type = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}, architecture["model_type"]
    try:
        config = AutoConfig.for_model(**({"vocab_size": ENTRIES} | ids | architecture))
        with torch.device("meta"):
            weights = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        if weights > 10**8:
            return f"no small configuration is known: this one has {weights:,} weights"
        model = AutoModelForCausalLM.from_config(config).float()
        tokens = torch.arange(32).view(2, 16)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    except Exception as error:
        return REASONS.get(config_type) or f"Transformers itself does not train it on text: {short(error)}"
    return err.strip().splitlines()[-1].removeprefix("train-loop: ") if err.strip() else "no output"


def decay(parameters: dict[str, Any]) -> str:
    """How many tensors decay, and which of several dimensions do not."""
    counts = [len(group["names"]) for group in parameters["groups"]]
    decayed = [len(group["names"]) for group in parameters["groups"] if group["weight_decay"]]
    exempt = {name.rpartition(".")[2] for names in parameters["exempt"].values() for name in names}
    return f"{sum(decayed)} of {sum(counts)}" + (f", not {', '.join(sorted(exempt))}" if exempt else "")


def cell(look: Callable[[], str]) -> str:
    """What was found, or the error."""
    try:
        return look()
    except Exception as error:
        return f"no: {short(error)}"


def evaluated(run: Path, settings: list[str]) -> str:
    """Whether `evaluate` finds the last logged loss."""
    code, out, err = call("evaluate", "--model", str(run / "model"), *settings)
    if code:
        return "no: " + err.strip().splitlines()[-1]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [event["loss"] for event in events if event["event"] == "evaluation"][-1]
    found = json.loads(out)["loss"]
    return "yes" if abs(found / logged - 1) < 1e-5 else f"no: loss {found:.6f}, logged {logged:.6f}"


def sampled(run: Path) -> str:
    """Whether greedy tokens with a cache are those without; two prompts of unlike lengths, alone and together."""
    from train_loop.config.sampling import Sampling
    from train_loop.generation.decoding import generate
    from train_loop.generation.kv_cache import Decoder, takes_positions
    from train_loop.generation.sampler import Sampler

    sampler = Sampler.load(str(run / "model"))
    greedy, prompts = Sampling(max_new_tokens=12, temperature=0), ([5, 6, 7, 8, 9], [10, 11])

    def tokens(rows: list[list[int]], cached: bool) -> list[list[int]]:
        return [each.tokens for each in generate(Decoder(sampler.model, cached), rows, greedy, None)]

    alone = [tokens([prompt], cached=False)[0] for prompt in prompts]
    if [tokens([prompt], cached=True)[0] for prompt in prompts] != alone:
        return "no: other tokens with a cache than without"
    if takes_positions(sampler.model) and tokens(list(prompts), cached=True) != alone:
        return "no: other tokens in a batch than alone"
    return "yes"


def resumed(run: Path, settings: list[str]) -> str:
    """Whether the run, set back to step 2, ends in the same bits."""
    before = contents(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "model")
    code, _, err = call("train", *settings, "--export.verify", "false")
    if code:
        return "no: " + err.strip().splitlines()[-1]
    return "yes, to the bit" if contents(run) == before else "no: other weights"


def balanced(run: Path, experts: dict[str, Any] | None, settings: list[str]) -> str:
    """How many experts a token gets, and how they are scored, if another run can balance them."""
    if experts is None:
        return "-"
    other = run.with_name(f"{run.name}-balanced")
    changes = {"run.output_dir": other, "train.max_steps": 2, "model.balance_weight": 0.1, "export.verify": "false"}
    given = dict(zip(settings[::2], settings[1::2], strict=True)) | {f"--{key}": changes[key] for key in changes}
    code, _, err = call("train", *(str(part) for pair in given.items() for part in pair))
    events = [] if code else [json.loads(each) for each in (other / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(other, ignore_errors=True)
    if code:
        return "no: " + err.strip().splitlines()[-1]
    if not all(event["balance_loss"] >= min(experts["top"]) * 0.5 for event in events if event["event"] == "step"):
        return "no: a balance that cannot be"
    top, number, kind = ("/".join(map(str, experts[name])) for name in ("top", "experts", "kind"))
    return f"{top} of {number}, {kind}"


def contents(run: Path) -> dict[Path, str]:
    """SHA-256 of all weights and moments."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*.safetensors")}


PRELOADED = ["accelerate", "scripts.architectures", "train_loop.job", "train_loop.metrics.language_model"]
"""What takes seconds to import, and the processes of all types need."""


def in_own_process(model_type: str, folder: Path, verify: bool) -> dict[str, str]:
    """`attempt` in a process of its own, forked from one that has imported everything."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    result = folder / f"{model_type}.json"
    child = processes.Process(target=write_row, args=(model_type, folder, verify, result))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        return {"train": f"took more than {SECONDS} seconds"}
    shutil.rmtree(folder / model_type, ignore_errors=True)
    if not result.exists():
        return {"train": f"exit code {child.exitcode}"}
    return dict(json.loads(result.read_text(encoding="utf-8")))


def write_row(model_type: str, folder: Path, verify: bool, result: Path) -> None:
    """`attempt`, into a file."""
    row = attempt(model_type, folder, verify)
    result.write_text(json.dumps(row).replace(f"{folder}/", ""), encoding="utf-8")


def works(row: dict[str, str]) -> bool:
    """Whether everything in a row does."""
    return len(row) == len(COLUMNS) and not any(value.startswith("no") for value in row.values())


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """The table, and below it what does not train and why."""
    import transformers

    trained = {name: row for name, row in rows.items() if row["train"] == "yes"}
    lines = ["| " + " | ".join(("type", *COLUMNS[1:])) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in trained.items():
        lines.append("| " + " | ".join((f"`{name}`", *(row.get(column, "") for column in COLUMNS[1:]))) + " |")
    rest = [f"| `{name}` | {row['train'].replace('|', '/')} |" for name, row in rows.items() if name not in trained]
    whole = sum(map(works, trained.values()))
    tried = f"Transformers {transformers.__version__} has {len(rows)} types of causal models; {len(trained)} train."
    return f"""# Architectures

{tried} For {whole} of them everything else works, too.

`python scripts/architectures.py --write` makes this page. It tries each type with a small configuration and four
steps, on a CPU:

- **causal**: changing later tokens moves no earlier logit; "to 1e-07" says by how much rounding moves them.
- **decay**: how many of the tensors decay, and which of several dimensions do not: biases, scales and rates.
- **evaluate**: `train-loop evaluate` finds the loss that the run logged.
- **export**: a clean process without train_loop finds the exported model's weights, loss and greedy tokens.
- **sample**: greedy tokens with a cache are those without one; if the model takes positions, also in a batch.
- **resume**: set back to a checkpoint, the run ends in the same bits.
- **experts**: how many of a layer's experts a token gets, and what makes scores of the router's output. All these types
  can be [balanced](own-data.md#mixtures-of-experts).

Types that have `is_decoder` (BERT and its relatives) are causal only with `is_decoder: true`, XLNet with
`attn_type: uni`, XLM with `causal: true`. Without it, they are refused.

{chr(10).join(lines)}

## What does not train

| type | why |
|---|---|
{chr(10).join(rest)}
"""


def told() -> dict[str, dict[str, str]]:
    """The rows that the page has."""
    found: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else ():
        name, *cells = line[2:-2].split(" | ")
        if name.startswith("`"):
            name = name.strip("`")
            found[name] = {"train": cells[0]} if len(cells) == 1 else dict(zip(COLUMNS, ("yes", *cells), strict=True))
    return found


def main() -> int:
    """Try them; returns the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("types", nargs="*", metavar="TYPE", help="model types (all)")
    options.add_argument(
        "--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}; of some types, only their rows"
    )
    options.add_argument("--processes", type=int, default=2, help="how many at once (2)")
    options.add_argument("--unverified", action="store_true", help="leave out the verification, which takes longest")
    given = options.parse_args()
    wanted = given.types or types()
    with tempfile.TemporaryDirectory(prefix="architectures-") as scratch:
        folder = Path(scratch)
        prepare(folder)

        def row(name: str) -> dict[str, str]:
            found = in_own_process(name, folder, not given.unverified)
            print(f"{name}: {found['train'] if len(found) == 1 else found}", file=sys.stderr, flush=True)
            return found

        with ThreadPoolExecutor(given.processes) as pool:
            rows = dict(zip(wanted, pool.map(row, wanted), strict=True))
    if given.write:
        before = told()
        rows = {name: rows.get(name) or before[name] for name in types() if name in rows or name in before}
        PAGE.write_text(markdown(rows), encoding="utf-8")
    else:
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    alone = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    os.environ.update(alone)
    # Under its own name, which the processes that are forked know.
    sys.exit(importlib.import_module("scripts.architectures").main())
