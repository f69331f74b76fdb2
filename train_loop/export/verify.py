"""The verified finish: an exported model must be the trained one for somebody who has only the folder.

Transformers alone loads it, offline, in a clean process (`verify_subprocess.py`). The process must find every weight to
the bit, the same loss on validation data, and the same greedy continuation. Only then is a run complete.

A model that was sharded may not fit into the memory that is free here. Then the clean process reads its files one
tensor at a time and compares every weight, but computes nothing; loss and tokens are those of the processes that
trained it, from the same weights, and the model card and the line at the end say so.
"""

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from train_loop import devices, files, launchers
from train_loop.data.loader import Windows, loader
from train_loop.data.order import Ids, cut
from train_loop.errors import TrainingError
from train_loop.export.weights import Written
from train_loop.models.building import vocabulary
from train_loop.models.parameters import tensors_once
from train_loop.precision import PRECISIONS
from train_loop.signals import StopRequest
from train_loop.training.state import Run

MOST_TOKENS = 65_536
"""At most this many validation tokens are evaluated again, in whole windows, spread evenly."""
NEW_TOKENS = 20

_PROGRAM = str(Path(__file__).with_name("verify_subprocess.py"))
_PROMPT = 8  # tokens, the first ones of the validation data
_POLL_SECONDS = 0.1
# Numbers that a forward pass may hold at a time for each token, as a multiple of the vocabulary (logits, their
# logarithms and copies) and of the hidden size: more than models do.
_OF_VOCABULARY, _OF_WIDTH = 4, 64
# Variables that launchers set for their own processes; the clean process must not see them.
_TORCHS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")
_LAUNCHERS = _TORCHS + launchers.PREFIXES


@dataclass(frozen=True)
class Expected:
    """What the clean process must find: loss in nats per target on `blocks`, token ids of a greedy continuation."""

    blocks: Ids
    loss: float
    prompt: list[int]
    continuation: list[int]


def probed(windows: Windows) -> Ids:
    """Numbers of the windows to evaluate: all, or MOST_TOKENS' worth of them, spread evenly."""
    most = max(1, MOST_TOKENS // windows.block_size)
    return np.unique(np.linspace(0, len(windows) - 1, min(most, len(windows)), dtype=np.int64))


def prompt(windows: Windows) -> list[int]:
    """Token ids to continue: the first ones of the validation data, with room for more in one block."""
    return windows.store.tokens[: max(1, min(_PROMPT, windows.block_size - 1, len(windows.store)))].tolist()


class Room(NamedTuple):
    """Where a clean process can compute with the model: on a device, or nowhere (None). Sizes in bytes."""

    device: str | None
    needed: float
    free: float


def room(run: Run) -> Room:
    """Where there is enough free memory for the model in fp32 and one forward pass: the run's device, or the CPU."""
    accelerator, model = run.context.accelerator, run.state.model
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    tokens = run.evaluation_batch_size * run.config.data.block_size
    needed = sum(each.numel() * each.element_size() for each in tensors_once(model).values())
    needed += 4 * tokens * (_OF_VOCABULARY * vocabulary(model) + _OF_WIDTH * width)
    # A sharded model may be larger than the memory of one device.
    own = [] if accelerator.is_fsdp2 or accelerator.device.type == "cpu" else [accelerator.device]
    free = 0.0
    for device in [*own, torch.device("cpu")]:
        if needed <= (free := devices.free_memory(device)):
            return Room(str(device), needed, free)
    return Room(None, needed, free)


def in_words(room: Room, expected: Expected) -> str:
    """What has been verified, and by whom, once `verify` has passed."""
    if room.device is not None:
        return f"verified in a clean process: all weights, loss {expected.loss:.4f}, greedy tokens"
    sizes = f"the model needs {room.needed / 1e9:,.1f} GB of memory, and {room.free / 1e9:,.1f} GB were free"
    return (
        f"verified in a clean process: all weights, but not loss and greedy tokens, because {sizes}; the loss, "
        f"{expected.loss:.4f}, and the tokens are those of the processes that trained it, from the same weights"
    )


def verify(folder: Path, run: Run, written: Written, expected: Expected, room: Room) -> bool:
    """Check an exported model in a clean process; TrainingError if it is not the trained one.

    Args:
        run: the run that trained it; a request to stop it ends the check, and False is returned.
        written: hashes of the trained weights, and of what was written.
        expected: what the trained model gives on the validation data. The clean process computes in fp32.
        room: where the clean process computes; if nowhere, it compares weights alone.
    """
    # Beside the model, where the run's next start finds what a kill leaves.
    probe = files.private(folder.resolve().with_name("probe"))
    probe.mkdir()
    try:
        _write_probe(probe, run, written, expected)
        found = _in_clean_process(folder, probe, room.device or "none", run.context.stop)
    finally:
        files.remove(probe)
    if found is None:
        return False
    if problem := _differences(found, expected, run.config.run.mixed_precision):
        raise TrainingError(f"exported model: is not the model that was trained: {problem}")
    return True


def _in_clean_process(folder: Path, probe: Path, device: str, stop: StopRequest) -> dict[str, Any] | None:
    """What a clean process finds, which gets the folders of the model and the probe; None if asked to stop."""
    out, err = probe / "out", probe / "err"
    with open(out, "w", encoding="utf-8") as stdout, open(err, "w", encoding="utf-8") as stderr:
        # -P: Python does not look for modules in the script's folder, which belongs to this package. In a session of
        # its own, the process gets no signals to this one's group.
        process = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM, str(folder.resolve()), str(probe), device],
            stdout=stdout,
            stderr=stderr,
            cwd=probe,
            env=_environment(),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if stop.asked:
                    return None
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        lines = err.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise TrainingError(f"exported model: cannot be loaded and run by itself ({lines[-1][:300]})")
    return dict(json.loads(out.read_text(encoding="utf-8").splitlines()[-1]))


def _differences(found: dict[str, Any], expected: Expected, precision: str) -> str:
    """How the findings of a clean process differ from those expected, in words; empty if they don't."""
    _, same_loss, same_logit = PRECISIONS[precision]
    if problems := found["other_files"]:
        return f"{len(problems)} problems with its files, first {problems[0]}"
    if names := found["other_weights"]:
        return f"{len(names)} weights differ, first {names[0]}"
    if "loss" not in found:
        return ""
    if not math.isclose(found["loss"], expected.loss, rel_tol=same_loss, abs_tol=1e-6):
        return f"its loss is {found['loss']:.6f}, that of the trained model {expected.loss:.6f}"
    if found["greedy"] != expected.continuation and not max(found["gaps"], default=0.0) <= same_logit:
        return f"it continues with tokens {found['greedy']}, the trained model with {expected.continuation}"
    return ""


def _write_probe(probe: Path, run: Run, written: Written, expected: Expected) -> None:
    """Write what the clean process needs: validation windows, prompt and hashes of the weights."""
    windows, batch_size = run.validation, run.evaluation_batch_size
    batches = list(loader(windows, cut(expected.blocks, batch_size)))
    names = ("inputs", "targets") if batches[0].positions is None else ("inputs", "targets", "positions")
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, probe / "probe.safetensors")
    content = {
        "batch_size": batch_size,
        "prompt": expected.prompt,
        "continuation": expected.continuation,
        "max_new_tokens": new_tokens(windows),
        **written._asdict(),
    }
    (probe / "probe.json").write_text(json.dumps(content), encoding="utf-8")


def new_tokens(windows: Windows) -> int:
    """How many tokens to add to the prompt: no more than fit into one block."""
    return max(0, min(NEW_TOKENS, windows.block_size - len(prompt(windows))))


def _environment() -> dict[str, str]:
    """This process's variables without those of launchers; libraries stay offline."""
    own = {"RANK", "WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith(_LAUNCHERS)}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
