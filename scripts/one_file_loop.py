"""The idea of train_loop in one file: train a causal language model so that every token and number is accounted for.

    python scripts/one_file_loop.py --config FILE.yaml
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 scripts/one_file_loop.py --config FILE.yaml

To be read from top to bottom. It takes the package's settings, as far as `SETTINGS` has them, and gives its losses, on
any number of processes. Left out are speed, half precision and checkpoints. (On a CPU the package draws other dropout
masks for tensors of 8,192 numbers or more: there, losses are others.)
"""

import argparse
import glob
import hashlib
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# Settings: sections and keys of a YAML file, with the package's defaults. Any other key is refused.
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"output_dir": None, "seed": 0},
    "model": {"name_or_path": None, "architecture": None},  # one of the two: a folder, or {model_type: gpt2, ...}
    "tokenizer": {"name_or_path": None},  # a folder; by default the model's
    "data": {"source": "files", "files": [], "validation_files": [], "block_size": 128},  # .txt files, or patterns
    "batch": {"sequences_per_step": 8, "micro_batch_size": None},
    "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.01, "betas": [0.9, 0.999], "max_grad_norm": 1.0},
    "schedule": {"name": "linear", "warmup_steps": 0},  # linear, cosine or constant
    "train": {"epochs": 3, "max_steps": None},
    "evaluation": {"every": "epoch", "batch_size": None},
    "sample": {"prompts": [""], "max_new_tokens": 100, "temperature": 1.0, "top_k": 50, "top_p": 0.95},
}


def read_settings(path: str) -> Any:
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for section, key, value in ((section, *each) for section, keys in given.items() for each in keys.items()):
        if key not in SETTINGS.get(section, {}) or value in ("auto", "hub", "stdlib", "wsd"):
            raise SystemExit(f"{path}: {section}.{key} {value}: only the whole package has this")
    return argparse.Namespace(**{name: argparse.Namespace(**SETTINGS[name] | given.get(name, {})) for name in SETTINGS})


# Randomness: every use has a seed of its own, hashed from what it is for. Nothing depends on what was drawn before.
def key_of(purpose: str, *numbers: int) -> int:
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# Data: documents become one stream of tokens, d0 d0 d0 EOS d1 d1 EOS ..., that is cut into blocks. A block's targets
# are its inputs moved by one, so each token but the stream's first is predicted exactly once an epoch.
IGNORED = -100  # the target where there is nothing to predict: in the last block, and in an empty one after it
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}  # text that spells a special token stays text


def read_blocks(patterns: list[str], tokenizer: Any, size: int) -> Tensor:  # inputs and targets [2, blocks + 1, size]
    paths = dict.fromkeys(path for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True)))
    texts = [text for path in paths if (text := Path(path).read_bytes().decode("utf-8-sig"))]
    documents = [[*tokenizer.encode(text, **AS_TEXT), tokenizer.eos_token_id] for text in texts]
    stream = torch.tensor([token for document in documents for token in document])
    missing = (-(-(len(stream) - 1) // size) + 1) * size + 1 - len(stream)
    inputs, targets = (F.pad(stream, (0, missing), value=each) for each in (tokenizer.eos_token_id, IGNORED))
    return torch.stack([inputs[:-1], targets[1:]]).view(2, -1, size)


# Order: each epoch visits the blocks in another order, a keyed permutation that tells the block at any position by
# itself (a Feistel network on a x b >= n points). So step one million is found at once, without any saved state.
def permuted(position: int, n: int, seed: int) -> int:
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    left, right = divmod(position, b)
    for number in (0, 2):
        left = (left + mix(right ^ mix(seed + number))) % a
        right = (right + mix(left ^ mix(seed + number + 1))) % b
    found = left * b + right
    return found if found < n else permuted(found, n, seed)  # few land outside, and walk on


def mix(x: int) -> int:  # 64 bits, each of which depends on all those of x (SplitMix64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


# Optimizer: AdamW. Decay pulls matrices, which multiply, towards zero, but not norms and biases, which scale and add.
def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decays: dict[nn.Parameter, float] = {}
    for owner in model.modules():
        for each in owner.parameters(recurse=False):
            decays[each] = 0.0 if "norm" in type(owner).__name__.lower() or each.ndim < 2 else weight_decay
    return [{"params": [w for w in decays if decays[w] == rate], "weight_decay": rate} for rate in {*decays.values()}]


def learning_rate(step: int, steps: int, peak: float, schedule: Any) -> float:
    if step < schedule.warmup_steps:  # steps count from 0
        return peak * step / schedule.warmup_steps
    left = (steps - step) / max(1, steps - schedule.warmup_steps)
    return peak * {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule.name]


def nll_of(model: nn.Module, blocks: Tensor) -> Tensor:  # -log p of each target
    logits = model(input_ids=blocks[0], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), blocks[1].flatten(), ignore_index=IGNORED, reduction="none")


# Sampling: logits -> / temperature -> the k likeliest tokens -> of these as few as have probability p together -> draw.
def keep_likeliest(logits: Tensor, k: int, p: float) -> Tensor:  # the others get minus infinity; k 0 and p 1 keep all
    kth = logits.topk(min(k or logits.shape[-1], logits.shape[-1])).values[..., -1:]
    ascending, indices = logits.masked_fill(logits < kth, -math.inf).sort()
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False  # the likeliest stays, however small p is
    return ascending.masked_fill(removed, -math.inf).gather(-1, indices.argsort())


def sample(model: Any, tokenizer: Any, prompt: str, settings: Any, seed: int) -> str:
    start = tokenizer.encode(prompt, **AS_TEXT) or [tokenizer.bos_token_id]
    ids, temperature, context = [*start], max(settings.temperature, 1e-6), model.config.max_position_embeddings
    while len(ids) - len(start) < settings.max_new_tokens and ids[len(start) :][-1:] != [tokenizer.eos_token_id]:
        logits = model(input_ids=torch.tensor([ids[-context:]], device=model.device)).logits[0, -1].float().cpu()
        reached = keep_likeliest(logits / temperature, settings.top_k, settings.top_p).double().softmax(-1).cumsum(-1)
        uniform = (key_of("sample", seed, key_of("prompt", *start), 0, len(ids)) >> 10) / 2**53
        ids.append(int(torch.searchsorted(reached, uniform * reached[-1], right=True)))
    return tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    config = read_settings(parser.parse_args().config)
    accelerator = Accelerator(mixed_precision="no")
    rank, processes, seed = accelerator.process_index, accelerator.num_processes, config.run.seed
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer.name_or_path or config.model.name_or_path)
    files, size = (config.data.files, config.data.validation_files), config.data.block_size
    train, validation = (read_blocks(each, tokenizer, size).to(accelerator.device) for each in files)
    if config.model.name_or_path:
        model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    else:
        fields = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")} | {"pad_token_id": None}
        fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": size}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields | config.model.architecture))
        for name, module in reversed(list(model.named_modules())):  # children before their parents
            torch.manual_seed(key_of(f"weights of {name}", seed))  # so no weight depends on which came before it
            model._init_weights(module)
    for embedding in (each for each in model.modules() if isinstance(each, nn.Embedding)):
        embedding.padding_idx = None  # some models take the end of a text for padding, and would not train its row
    adamw = torch.optim.AdamW(decay_groups(model, config.optimizer.weight_decay), betas=config.optimizer.betas)
    parallel, optimizer = accelerator.prepare(model.train(), adamw)
    n, per_step = train.shape[1] - 1, config.batch.sequences_per_step
    micro, per_epoch = config.batch.micro_batch_size or per_step, -(-n // per_step)
    steps = config.train.max_steps or config.train.epochs * per_epoch
    period = per_epoch if config.evaluation.every == "epoch" else config.evaluation.every

    # The loop. A step minimises the mean over all of its targets, in all micro-batches m, on all W processes:
    #         loss = sum_m nll_m / T          T = targets of the step, known before the first forward pass
    # Gradients are averaged over processes, so each sum is scaled by W / T. A mean of means would be another number.
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        ids = [permuted(i, n, key_of("order", seed, epoch)) for i in range(n)[place * per_step :][:per_step]]
        targets, nll = int((train[1, ids] != IGNORED).sum()), []
        # Micro-batch m goes to process m mod W. All run equally many: who has none left takes the empty block.
        mine = range(rank, -(-len(ids) // (micro * processes)) * processes, processes)
        for number in mine:
            torch.manual_seed(key_of("dropout", seed, step, number))  # the same masks on any process
            with accelerator.no_sync(parallel) if number < mine[-1] else nullcontext():  # gradients are summed once
                nll.append(nll_of(parallel, train[:, ids[number * micro : (number + 1) * micro] or [n]]).sum())
                accelerator.backward(nll[-1] * processes / targets)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config.optimizer.learning_rate, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        loss = math.fsum(accelerator.gather(torch.stack(nll).detach()).tolist()) / targets
        log = {"event": "step", "step": step + 1, "loss": loss, "grad_norm": norm.item(), "processes": processes}
        accelerator.print(json.dumps(log))
        if (step + 1) % period and step + 1 < steps:
            continue
        model.eval()  # evaluation: every target once; sums are float64, and those of the batches are added up exactly
        with torch.no_grad():
            batches = validation[:, :-1].split(config.evaluation.batch_size or micro, dim=1)[rank::processes]
            sums = gather_object([nll_of(model, batch).cpu().double().sum().item() for batch in batches])
            loss = math.fsum(sums) / int((validation[1] != IGNORED).sum())
            log = {"event": "evaluation", "step": step + 1, "loss": loss, "perplexity": math.exp(loss)}
            accelerator.print(json.dumps(log))
            for prompt in config.sample.prompts:
                text = sample(model, tokenizer, prompt, config.sample, seed)
                accelerator.print(json.dumps({"event": "sample", "prompt": prompt, "continuation": text}))
        model.train()
    for part in (model, tokenizer) if config.run.output_dir and accelerator.is_main_process else ():
        part.save_pretrained(Path(config.run.output_dir) / "model")


if __name__ == "__main__":
    main()
