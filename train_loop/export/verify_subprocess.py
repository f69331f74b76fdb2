"""Runs for `verify.py` in a process of its own, without this package: what Transformers makes of an exported model.

    python verify_subprocess.py MODEL_FOLDER PROBE_FOLDER DEVICE          prints one JSON object

PROBE_FOLDER/probe.safetensors has inputs, targets and (where documents are isolated) positions [sequences, block]
int64; probe.json has the number of sequences to feed at a time, prompt and expected continuation as token ids, and
the SHA-256 of every weight's bytes.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(model_folder: str, probe_folder: str, device: str) -> None:
    """Load, measure, print."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    weights = model.state_dict()
    probe = json.loads((Path(probe_folder) / "probe.json").read_text(encoding="utf-8"))
    other = sorted(info["missing_keys"]) + [
        name
        for name, expected in probe["weights"].items()
        if name not in weights or hashlib.sha256(weights[name].contiguous().numpy().data).hexdigest() != expected
    ]
    model.to(device).eval()

    nll, count = 0.0, 0
    tensors = load_file(Path(probe_folder) / "probe.safetensors", device)
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
    found = {"loss": nll / count, "targets": count, "greedy": greedy, "gaps": gaps, "other_weights": other}
    assert "train_loop" not in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
