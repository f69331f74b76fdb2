"""Runs for `verify.py` in a process of its own, without this package: what Transformers makes of an exported model.

    python verify_subprocess.py MODEL_FOLDER PROBE_FOLDER DEVICE          prints one JSON object

PROBE_FOLDER/probe.safetensors has inputs, targets and (where documents are isolated) positions [sequences, block]
int64; probe.json has the number of sequences to feed at a time, prompt and expected continuation as token ids, the
SHA-256 of every weight's bytes by its name in the model ("weights"), and of what is in each file ("files").

Files are mapped into memory. If DEVICE is "none", the model does not fit: then files are compared one tensor at a time,
and nothing is computed.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(model_folder: str, probe_folder: str, device: str) -> None:
    """Load, measure, print."""
    probe = json.loads((Path(probe_folder) / "probe.json").read_text(encoding="utf-8"))
    problems = misplaced(Path(model_folder), probe["files"])
    AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    if problems:
        found: dict[str, Any] = {"other_weights": []}
    elif device == "none":
        AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
        found = {"other_weights": other_in_files(Path(model_folder), probe["files"])}
    else:
        found = computed(model_folder, Path(probe_folder), probe, device)
    assert "train_loop" not in sys.modules
    print(json.dumps(found | {"other_files": problems}))


def misplaced(folder: Path, files: dict[str, dict[str, str]]) -> list[str]:
    """What is not in the file where it should be, in words. Transformers itself reads all that an index names."""
    problems = [f"{path.name}: was not written" for path in folder.glob("*.safetensors") if path.name not in files]
    index = folder / "model.safetensors.index.json"
    places = dict.fromkeys(next(iter(files.values())), next(iter(files)))
    if len(files) > 1 or index.exists():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for file, expected in files.items():
        named = {name for name, place in places.items() if place == file}
        if not (folder / file).is_file():
            problems.append(f"{file}: is missing")
            continue
        with safe_open(folder / file, "pt") as opened:
            there = set(opened.keys())
        for what, names in (("holds", there), ("should hold, says the index,", named)):
            if names != set(expected):
                problems.append(f"{file}: {what} other tensors ({min(names ^ set(expected))})")
    return problems


def other_in_files(folder: Path, files: dict[str, dict[str, str]]) -> list[str]:
    """The names of tensors in files that are not what was written."""
    other = []
    for file, expected in files.items():
        with safe_open(folder / file, "pt") as opened:
            other += [name for name, each in expected.items() if sha256(opened.get_tensor(name)) != each]
    return other


def sha256(tensor: torch.Tensor) -> str:
    """The hash of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def computed(model_folder: str, probe_folder: Path, probe: dict[str, Any], device: str) -> dict[str, Any]:
    """What Transformers loads, its loss and greedy tokens."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    weights = model.state_dict()
    other = sorted(info["missing_keys"]) + [
        name for name, each in probe["weights"].items() if name not in weights or sha256(weights[name]) != each
    ]
    model.to(device).eval()

    nll, count = 0.0, 0
    tensors = load_file(probe_folder / "probe.safetensors", device)
    for start in range(0, len(tensors["inputs"]), probe["batch_size"]):
        batch = {name: tensor[start : start + probe["batch_size"]] for name, tensor in tensors.items()}
        options = {"position_ids": batch["positions"]} if "positions" in batch else {}
        log_p = model(input_ids=batch["inputs"], use_cache=False, **options).logits.float().log_softmax(-1)
        real = batch["targets"] >= 0
        picked = log_p.gather(2, batch["targets"].clamp(min=0)[..., None])[..., 0][real]
        nll -= float(picked.cpu().double().sum())
        count += int(real.sum())

    prompt, expected = probe["prompt"], probe["continuation"]
    greedy: list[int] = []
    if probe["max_new_tokens"]:
        ids, new = torch.tensor([prompt], device=device), probe["max_new_tokens"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        greedy = whole[0, len(prompt) :].tolist()
    ends = model.generation_config.eos_token_id
    if greedy and greedy[-1] in (ends if isinstance(ends, list) else [ends]):
        greedy.pop()
    # How far each expected token is from being the likeliest: of two equally likely ones, either may win.
    logits = model(input_ids=torch.tensor([prompt + expected], device=device), use_cache=False).logits[0].float()
    gaps = [float(at.max() - at[token]) for at, token in zip(logits[len(prompt) - 1 :], expected, strict=False)]
    return {"loss": nll / count, "targets": count, "greedy": greedy, "gaps": gaps, "other_weights": other}


if __name__ == "__main__":
    main(*sys.argv[1:])
