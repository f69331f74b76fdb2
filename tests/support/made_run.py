"""A run's files, made up: what a report is drawn from, without training for it."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

LAYERS, HEADS, EXPERTS, MAX_GRAD_NORM = 3, 2, 4, 1.0
WORDS = "def __init__ ( self , name ) : \n     self . name = name".split(" ")
HOSTILE = "</script><img src=x onerror=alert(1)><!--"


def make_run(
    folder: Path,
    steps: int = 300,
    seed: int = 0,
    state: str = "complete",
    every: int = 20,
    study: bool = True,
    text: str = "",
    learning_rate: float = 3e-3,
) -> Path:
    """Write a run's files into `folder`; `text` stands in prompts, samples, tokens and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"seed": seed, "mixed_precision": "no"},
        "data": {"files": [text or "a.txt"]},
        "optimizer": {"learning_rate": learning_rate, "max_grad_norm": MAX_GRAD_NORM},
        "train": {"max_steps": steps},
    }
    truth = {
        "batch": {"steps": steps, "targets": steps * 1000, "targets_per_full_step": 1000},
        "model": {"class": "LlamaForCausalLM", "attention": text or "sdpa"},
        "parameters": {
            "total": 1_377_408,
            "tied": [["embed", "head"]],
            "groups": [
                {"weight_decay": 0.1, "numbers": 1_376_256, "names": ["embed", f"layers.0.{text or 'q'}"]},
                {"weight_decay": 0.0, "numbers": 1152, "names": ["norm"]},
            ],
        },
    }
    books = {"documents": 31, "bytes": 764_213, "text_tokens": 216_846, "eos_tokens": 31, "gzip_bytes": 190_322}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    (folder / "ledger.json").write_text(json.dumps({"train": books, "validation": books}), encoding="utf-8")
    set_state(folder, state, steps)
    append(folder / "metrics.jsonl", metrics(steps, seed, every, text, learning_rate))
    if study:
        append(folder / "study.jsonl", statistics(steps, seed, every, text))
    return folder


def set_state(folder: Path, state: str, step: int, reason: str = "") -> None:
    """Write status.json."""
    (folder / "status.json").write_text(json.dumps({"state": state, "step": step, "reason": reason}))


def append(path: Path, events: list[dict[str, Any]]) -> None:
    """Add lines to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def metrics(
    steps: int, seed: int, every: int, text: str = "", learning_rate: float = 3e-3, after: int = 0
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after step `after`: one skipped step (the 7th), some clipped ones, evaluations."""
    draw = random.Random(f"{seed} {after}")
    events: list[dict[str, Any]] = []
    for step in range(after + 1, steps + 1):
        loss = 3.2 + 5.1 * math.exp(-step / 60) + draw.gauss(0, 0.12) + 0.1 * seed
        parts = {"data": 0.001, "forward": 0.045, "backward": 0.09, "communication": 0.0, "waiting": 0.002}
        seconds = {f"{part}_seconds": value * draw.uniform(0.9, 1.2) for part, value in parts.items()}
        seconds["optimizer_seconds"] = 0.004
        whole = sum(seconds.values()) * 1.03
        line = {
            "event": "step",
            "step": step,
            "epoch": step / 1000,
            "loss": loss,
            "learning_rate": learning_rate * min(step / 30, 1) * (1 - step / (steps + 1)),
            "grad_norm": 0.5 + 2.5 * math.exp(-step / 25) + abs(draw.gauss(0, 0.25)),
            "tokens": 1000,
            "tokens_per_second": 1000 / whole,
            "seconds": whole,
            "mfu": 0.4 * draw.uniform(0.9, 1.1),
            "peak_memory_bytes": 741_000_000,
            "balance_loss": 2 + math.exp(-step / 60),
            **seconds,
        }
        if step == 7:
            line |= {"loss": None, "grad_norm": None, "skipped": True, "blocks": [1, 2]}
        events.append(line)
        if step % every == 0 or step == steps:
            nll = 3.3 + 5.0 * math.exp(-step / 60) + 0.1 * seed
            events.append(
                {
                    "event": "evaluation",
                    "step": step,
                    "epoch": step / 1000,
                    "loss": nll,
                    "perplexity": math.exp(nll),
                    "bits_per_byte": nll * 0.41,
                    "accuracy": 0.3 * (1 - math.exp(-step / 60)),
                    "tokens": 216_876,
                }
            )
            sampled = {"prompt": "    def __init__(self" + text, "continuation": f", name{step}):\n        pass" + text}
            events.append({"event": "sample", "step": step, **sampled})
    return events


def statistics(steps: int, seed: int, every: int, text: str = "", after: int = 0) -> list[dict[str, Any]]:
    """The lines of study.jsonl: statistics and the probe, every so many steps."""
    draw = random.Random(f"study {seed} {after}")
    events: list[dict[str, Any]] = []
    tokens = ["The", *WORDS, text or "end"]
    for step in range(after + every, steps + 1, every):
        fall = math.exp(-step / 60)

        def layer(depth: int, step: int = step, fall: float = fall) -> dict[str, Any]:
            return {
                "weight_norm": 20 + depth + step / 50,
                "grad_norm": (0.1 + fall) * (depth + 1) * draw.uniform(0.8, 1.2),
                "update_ratio": 1e-3 * (1 + 3 * fall) * draw.uniform(0.7, 1.4),
                "activation_rms": 0.5 * (depth + 1) * (1 + step / 300),
                "activation_outliers": 5 + depth + draw.random(),
                "attention_entropy": [3.5 * (0.3 + 0.7 * fall) + 0.2 * head for head in range(HEADS)],
                "dead_units": 0.02 * depth,
            }

        names = ["embed", *(f"layers.{depth}.{part}.weight" for depth in range(LAYERS) for part in ("q", "up"))]
        parameter = {"weight_norm": 10.0, "grad_norm": 0.1 + fall, "update_ratio": 1e-3, "second_moment": 1e-4}
        events.append(
            {
                "event": "statistics",
                "step": step,
                "tokens": 1000 * step,
                "parameters": {name: {key: v * draw.uniform(0.5, 2) for key, v in parameter.items()} for name in names},
                "layers": {str(depth): layer(depth) for depth in range(LAYERS)},
                "experts": {
                    str(depth): {
                        "tokens": [0.2 + 0.2 * each for each in range(EXPERTS)],  # two of four for each token
                        "probability": [0.1 + 0.1 * each for each in range(EXPERTS)],
                    }
                    for depth in range(LAYERS)
                },
                "logits": {"entropy": 3 + 5 * fall, "top_1_probability": 0.35 - 0.3 * fall, "z": 9 - fall},
                "clipped_share": fall,
                "gradient_noise_scale": 3000 * (1.2 - fall),
                "loss_by_position": [3.2 + 5 * fall + 1.5 / (1 + place) for place in range(8)],
                "position_bins": [32 * place for place in range(8)],
                "loss_by_frequency": [2 + place + 4 * fall for place in range(4)],
                "frequency_bins": [f"1e{6 - place}{text}" for place in range(4)],
            }
        )
        losses = [max(0.02, 8 * fall + draw.uniform(0, 4)) for _ in tokens]
        top = [
            [[word, 0.5 / (place + 1)] for place, word in enumerate([token, "the", "of", ",", "\n"])]
            for token in tokens
        ]
        events.append(
            {
                "event": "probe",
                "step": step,
                "text": "".join(tokens),
                "tokens": tokens,
                "losses": [None, *losses[1:]],
                "top": [None, *top[1:]],
            }
        )
    return events
