"""How fast steps are and where their time goes: tokens per second, share of the hardware's rate, memory.

    step  |-- data --|-- forward --|-- backward --|-- communication --|-- waiting --|-- optimizer --|

Each part is a context. On a GPU, events in the queue mark its beginning and its end. They are read when the loop has
waited for the GPU anyway, so measuring does not add a wait. Nothing waits for the update of the weights, so its time is
counted with the next step. On a CPU, a clock is enough.

Model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B) is a step's share of what the hardware could do:

    operations per token = 6 N + 12 L H Q T          N weights used in multiplications, L layers, H heads of width Q,
    mfu = operations per second / rate               T tokens of context (as if attention were not causal)

The rate does not come from a data sheet. It is that of a large matrix product, measured here before the first step.
"""

import math
import time
from collections import deque
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from train_loop import devices
from train_loop.ops import cpu, products
from train_loop.precision import PRECISIONS
from train_loop.step_parts import STEP_PARTS

MEASURED = {"tokens_per_second", "seconds", "mfu", "peak_memory_bytes"} | {f"{part}_seconds" for part in STEP_PARTS}
"""What a line of metrics.jsonl says about the machine. Everything else follows from (configuration, seed, step)."""

_SIDES = (1024, 2048, 4096, 8192)  # of the matrices whose product is timed; the first side that takes long enough
_LONG_ENOUGH = 1e-3  # seconds; starting a product takes no time compared with this
_SECONDS = 0.1  # how long to time products


class Span:
    """Adds up the time between entering and leaving it, on the host and on a device that has a queue of work."""

    def __init__(self, part: str, device: torch.device) -> None:
        self._device = device if devices.has_events(device) and part != "step" else None
        self._events: deque[tuple[Any, Any]] = deque()
        self._host = 0  # nanoseconds, so that the results have few digits

    def __enter__(self) -> None:
        if self._device is not None:
            self._begin = devices.event(self._device)
        self._entered = time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self._host += time.perf_counter_ns() - self._entered
        if self._device is not None:
            self._events.append((self._begin, devices.event(self._device)))

    def take_host(self) -> int:
        """Nanoseconds on the host since the last call."""
        taken, self._host = self._host, 0
        return taken

    def take_device(self, host: int) -> int:
        """Nanoseconds on the device, for everything that has ended there since the last call; without one, `host`."""
        if self._device is None:
            return host
        taken = 0
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            taken += round(begin.elapsed_time(end) * 1e6)
        return taken


class Throughput:
    """The speed of a run's steps, for the log. Call it with a part's name to get a context that measures the part.

    data: fetching batches; forward; backward: with the part of the gradient exchange that runs at the same time;
    communication: the rest of that exchange (with FSDP2, it is inside forward and backward); waiting: for the losses of
    the slowest process; optimizer: clipping, the finite check and the update; step: all of these except data, measured
    on the host only. All processes are assumed to have the same hardware, whose `rate` is in operations per second.
    """

    def __init__(self, accelerator: Accelerator, objective: nn.Module, model: PreTrainedModel, block_size: int) -> None:
        self.operations = operations_per_token(model, block_size)  # None if they can't be counted this way
        dtype = getattr(torch, PRECISIONS[accelerator.mixed_precision].dtype)
        self.rate = matrix_rate(accelerator.device, dtype) * accelerator.num_processes
        self._peak_memory = devices.peak_memory(accelerator.device)
        self._parallel = objective if isinstance(objective, DistributedDataParallel) else None
        if self._parallel is not None:
            self._parallel._set_ddp_runtime_logging_sample_rate(1)
        self._spans = {part: Span(part, accelerator.device) for part in (*STEP_PARTS, "step")}

    def __call__(self, part: str) -> "Span":
        """A context whose time is added to the part's."""
        return self._spans[part]

    def of_step(self, tokens: int) -> dict[str, Any]:
        """What the log says about a step with this many targets; see `MEASURED`."""
        host = {part: span.take_host() for part, span in self._spans.items()}
        seconds = (host["data"] + host["step"]) / 1e9
        parts = {part: self._spans[part].take_device(host[part]) / 1e9 for part in STEP_PARTS}
        exposed = min(self._exposed(), parts["backward"])
        parts["backward"] -= exposed
        parts["communication"] += exposed
        found: dict[str, Any] = {"tokens_per_second": tokens / seconds, "seconds": seconds}
        if self.operations is not None:
            found["mfu"] = self.operations * tokens / seconds / self.rate
        found["peak_memory_bytes"] = self._peak_memory()
        return found | {f"{part}_seconds": each for part, each in parts.items()}

    def _exposed(self) -> float:
        """Seconds by which the exchange of gradients outlasted the last backward pass."""
        found = self._parallel._get_ddp_logging_data() if self._parallel is not None else {}
        exposed = found.get("backward_comm_time", 0) - found.get("backward_compute_comm_overlap_time", 0)
        return max(0.0, exposed / 1e9)


def operations_per_token(model: PreTrainedModel, block_size: int) -> int | None:
    """Operations (multiplications, additions) of one token, forward and backward; None if layers or tokens differ."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    looked_up = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        looked_up.discard(id(head.weight))
    weights = sum(each.numel() for each in model.parameters() if each.ndim > 1 and id(each) not in looked_up)
    heads = getattr(config, "num_attention_heads", 0) or 0
    try:
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    except RuntimeError:  # each layer has a width of its own
        return None
    return 6 * weights + 12 * getattr(config, "num_hidden_layers", 0) * heads * width * block_size


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several large matrix products, with the fastest library available."""
    for side in _SIDES:
        seconds = _fastest(*(torch.randn(side, side, dtype=dtype, device=device) for _ in range(2)))
        if seconds >= _LONG_ENOUGH:
            break
    return 2 * side**3 / seconds


def _fastest(x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of the fastest of several products of two matrices."""
    ways = [lambda: x @ y]
    if cpu.fits(x):
        ways.append(lambda: products.forward(x, y))
    best, began = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - began < _SECONDS:
        for multiply in ways:
            devices.synchronize(x.device)
            start = time.perf_counter()
            multiply()
            devices.synchronize(x.device)
            best = min(best, time.perf_counter() - start)
    return best
