"""Part "memory": what `train-loop estimate` says, against what the device's allocator counts in a real run.

Each shape takes two steps, with the largest part of its memory once in weights and once in activations. The larger one
comes again under FSDP2 on one process, which shards nothing, but gathers each layer.
"""

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from gpu_day.models import forget_accelerator, quiet
from gpu_day.rows import Finding, Rows, Skipped, at_most, needs, part
from gpu_day.runs import settings
from train_loop import job
from train_loop.analysis import estimate
from train_loop.config.load import config_from_arguments
from train_loop.devices import has_peak_memory
from train_loop.training.step import train_step

_LIMIT = 0.15  # what is promised
_SHAPES: dict[bool, dict[str, dict[str, Any]]] = {
    True: {"small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}},
    False: {
        "160 million parameters": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
        "1.6 billion parameters": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 30},
    },
}


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """One process in fp32 and bf16, then FSDP2."""
    quiet()
    for name, shape in _SHAPES[cpu].items():
        for precision, micro_batch in (("no", 2), ("bf16", 16)):
            what = f"{name}, {'fp32' if precision == 'no' else precision}, {micro_batch} sequences a micro-batch"
            rows.check(f"estimate: {what}", _beside, cpu, folder, shape, {"precision": precision, "size": micro_batch})
    if not cpu:
        options = {"precision": "bf16", "size": 4, "sharded": True}
        rows.check("estimate: 1.6 billion parameters, bf16, FSDP2 on one process", _beside, cpu, folder, shape, options)


def _beside(cpu: bool, folder: Path, shape: dict[str, Any], given: dict[str, Any]) -> Finding:
    needs("datasets")
    heads = {"num_attention_heads": shape["hidden_size"] // 64 or 1, "vocab_size": 32_000 if not cpu else 512}
    arguments = settings(
        cpu,
        model__architecture=json.dumps({"model_type": "llama"} | shape | heads),
        run__output_dir=folder / "run",
        run__mixed_precision=given["precision"],
        data__block_size=64 if cpu else 512,
        batch__sequences_per_step=2 * given["size"],
        batch__micro_batch_size=given["size"],
    )
    config = config_from_arguments(arguments)
    sharded = given.get("sharded", False)
    expected = estimate.run(config, 1, "fsdp2" if sharded else "none")["bytes"]["peak of a step"]
    peak = _peak(config, sharded)
    if peak is None:
        raise Skipped(f"this device counts no peak; the estimate is {expected / 1e9:.3f} GB")
    why = f"estimate {expected / 1e9:.3f} GB, max_memory_allocated {peak / 1e9:.3f} GB"
    return at_most(abs(expected / peak - 1), _LIMIT, why=why)


def _peak(config: Any, sharded: bool) -> int | None:
    """The device's own count in the second step; None if it has none."""
    forget_accelerator()
    gc.collect()  # the model before this one
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    variables |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    if sharded:
        os.environ |= variables
    try:
        run = job.set_up(config).run
        device = run.context.accelerator.device
        if not has_peak_memory(device):
            return None
        module: Any = torch.get_device_module(device)
        run.context.objective.train()
        batches = run.batches.after(0)
        train_step(run.context, run.state, next(batches), 1e-4)
        module.reset_peak_memory_stats()
        train_step(run.context, run.state, next(batches), 1e-4)
        return int(module.max_memory_allocated())
    finally:
        for name in variables if sharded else ():
            os.environ.pop(name, None)


if __name__ == "__main__":
    part(checks)
