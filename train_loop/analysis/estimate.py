"""What memory a run takes on each process, and what fits: arithmetic over a model without values, and measured layers.

A training step is followed from its beginning to its end. At each place, what there is in memory is known: weights and
moments; gradients, of all weights or of those that the backward pass has come to; what layers keep, of all or of those
that it has not come to yet (`layer_memory.py` measures them); the output layer's loss; with FSDP2, what is gathered.
The place with the most of all decides.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel

from train_loop import devices
from train_loop.analysis.layer_memory import CHOSEN, EXPERTS, Measured, Passes, first_number, layers_of, measure
from train_loop.config import paths
from train_loop.config.architecture import read_architecture
from train_loop.config.schema import Config
from train_loop.data import tokenizer
from train_loop.errors import InputError, one_line
from train_loop.models import building, loading, size
from train_loop.models.architecture import configuration
from train_loop.ops import cross_entropy
from train_loop.precision import PRECISIONS
from train_loop.trust import check_model

SHARDINGS = ("none", "fsdp2", "hsdp")
OWN_BYTES = 0.6e9
"""What a process takes beside tensors: libraries, and on a GPU its context there."""
_GPUS_OF_A_HOST = 8  # if this machine has none to count
_MOST_PROCESSES = 1024


@dataclass(frozen=True)
class Plan:
    """How a run is spread: `shards` processes hold one copy of the state together."""

    processes: int
    sharding: str
    shards: int
    micro_batch_size: int
    sequences_per_step: int

    @property
    def micro_batches(self) -> int:
        """Of a process in a step, at most."""
        return math.ceil(math.ceil(self.sequences_per_step / self.micro_batch_size) / self.processes)

    @property
    def accumulates(self) -> bool:
        """Whether a backward pass adds to gradients that are there, instead of making them."""
        return self.sharding == "none" and self.micro_batches > 1


class Unit(NamedTuple):
    """What FSDP2 gathers at once: its weights, and those that one of `shards` processes holds, as it pads them."""

    weights: int
    held: int


class Peak(NamedTuple):
    """The most of a step in bytes, and of that what is gathered, what layers keep, what the loss takes."""

    total: float
    gathered: float = 0.0
    activations: float = 0.0
    loss: float = 0.0


class Estimate:
    """The memory of a run under any plan.

    Args:
        config: of the run; its model need not fit into this machine's memory.
        device: whose kernels are measured: the layers run on it.
        target: type of the device that the run is for ("cpu" or another), which decides what it does besides.
    """

    def __init__(self, config: Config, device: torch.device, target: str) -> None:
        self.config, self.device, self.target = config, device, target
        self.outline = outline(config)
        self.dtype = getattr(torch, PRECISIONS[config.run.mixed_precision].dtype)
        if target == "cpu" and not devices.cpu_computes_bf16():
            self.dtype = torch.float32
        self._measured: dict[tuple[bool, bool], Measured] = {}

    @property
    def parameters(self) -> int:
        """Of the model; tied ones once."""
        return sum(each.numel() for each in self.outline.parameters())

    def measured(self, sharded: bool, accumulates: bool) -> Measured:
        """The layers, measured when they are first asked for."""
        key = sharded and self.dtype != torch.float32, accumulates
        if key not in self._measured:
            passes = Passes(self.device, self.dtype, *key)
            try:
                self._measured[key] = measure(self.config, self.outline, passes)
            except InputError:
                raise
            except Exception as error:  # whatever a model raises that is cut to a few layers
                kind = self.outline.config.model_type
                problem = f"its layers cannot be measured by themselves ({one_line(error)})"
                raise InputError(f"estimate: a model of type {kind}: {problem}") from None
        return self._measured[key]

    def units(self, shards: int) -> list[Unit]:
        """The layers, and at the end all that is outside of them."""
        return [_unit(parameters, shards) for parameters in _parts(self.outline)]

    def parts(self, plan: Plan) -> dict[str, float]:
        """Bytes of each process, by what they are for; "peak" is the most of a step, "copy" in the host's memory."""
        units, sharded = self.units(plan.shards), plan.sharding != "none"
        held, total = sum(unit.held for unit in units), self.parameters
        peak = self.peak(plan)
        found = {"weights": 4.0 * held, "gradients": 4.0 * held, "moments": 8.0 * held}
        if not sharded and plan.processes > 1:
            found["gradients' copy for DDP"] = 4.0 * total
        if self.config.run.reproducible == "bitwise":
            found["sums of run.reproducible bitwise"] = 8.0 * total
        found |= {"gathered at once": peak.gathered, "activations": peak.activations, "output layer": peak.loss}
        found["peak of a step"] = peak.total
        found["copy that is saved"] = 12.0 * held if self.config.checkpoint.background else 0.0
        return found

    def peak(self, plan: Plan) -> Peak:
        """The place of a step with the most bytes."""
        return max(self._places(plan), key=lambda place: place.total)

    def _places(self, plan: Plan) -> Iterator[Peak]:
        """The bytes at each place of a step from the second one on, when there are moments."""
        sharded, rows, again = plan.sharding != "none", plan.micro_batch_size, plan.micro_batches > 1
        *units, rest = self.units(plan.shards)
        held, total = sum(each.held for each in (*units, rest)), self.parameters
        found, tail = self.measured(sharded, plan.accumulates), self._loss(plan)
        wide = self.dtype.itemsize if sharded else 0  # bytes of a number that is gathered
        state = 12.0 * held + (8.0 * total if self.config.run.reproducible == "bitwise" else 0.0)
        if not sharded and plan.processes > 1:
            state += 4.0 * total  # buckets, which DDP sums over the processes
        # Gradients of earlier micro-batches; with FSDP2, a layer's are shared out as soon as they are there.
        grads = 4.0 * (held if sharded else total) if again else 0.0
        outside = wide * rest.weights  # is gathered first, and stays until the end
        kept = found.before(rows)

        def place(extra: float, gathered: float = 0.0, loss: float = 0.0) -> Peak:
            return Peak(state + grads + kept + loss + extra + outside + gathered, outside + gathered, kept, loss)

        for layer, unit in zip(found.layers, units, strict=True):
            yield place(layer.forward(rows), 2 * wide * unit.weights)
            kept += layer.kept(rows)
        yield place(found.loss(rows), 0.0, tail.most)
        kept += found.kept(rows)
        loss = float(tail.kept)  # the output layer's gradient
        yield place(0.0, 0.0, loss)
        kept -= found.kept(rows)
        after = 0  # weights of the layer that came before in the backward pass
        for number in reversed(range(len(units))):
            layer, unit = found.layers[number], units[number]
            ahead = units[number - 1].weights if number else 0
            sent = 4 * after if sharded else 0
            yield place(layer.backward(rows) + sent, wide * (unit.weights + ahead), loss)
            kept -= layer.kept(rows)
            if sharded:
                yield place((wide + 4) * unit.weights + sent, wide * ahead, loss)
            grads += 0.0 if again else 4.0 * unit.held
            after = unit.weights
        head, embeddings = self.outline.get_output_embeddings(), self.outline.get_input_embeddings()
        table = 4.0 * sum(each.numel() for each in embeddings.parameters())
        tied = head is not None and head.weight is embeddings.weight
        joins = tied and self.target == "cpu" and not self.config.model.compile and found.fused
        yield place(0.0 if joins else table, 0.0, loss)
        if sharded:
            yield place(8.0 * rest.weights, 0.0, 0.0)
        yield Peak(state + 4.0 * held)

    def _loss(self, plan: Plan) -> cross_entropy.Memory:
        """What the output layer takes by itself, if the loss is train_loop's own."""
        sharded = plan.sharding != "none"
        head = self.outline.get_output_embeddings()
        if head is None or not self.measured(sharded, plan.accumulates).fused:
            return cross_entropy.Memory(0, 0)
        vocabulary, width = head.weight.shape
        held = self.dtype if sharded else torch.float32
        positions = plan.micro_batch_size * self.config.data.block_size
        types, compiled = (held, self.dtype), self.config.model.compile
        return cross_entropy.memory(positions, (vocabulary, width), types, self.target, compiled)


def outline(config: Config) -> PreTrainedModel:
    """A configuration's model on torch's meta device: shapes without values. InputError as for `building.build`."""
    if config.model.name_or_path is not None:
        name = paths.find(config.model.name_or_path, "model.name_or_path")
        source = f"model {config.model.name_or_path}"
        check_model(name)
        settings = loading.configuration(name, source)
    else:
        source = "model.architecture"
        settings = configuration(
            read_architecture(config.model.architecture), _tokenizer(config), config.data.block_size
        )
    model = size.outline(settings, source)
    building.check_fits(model, tokenizer.placeholder(1), config.data.block_size, source)
    return model


def _tokenizer(config: Config) -> Any:
    """The run's tokenizer; one that it is to train is as large as it will be."""
    if config.tokenizer.name_or_path is not None:
        return tokenizer.load(config.tokenizer.name_or_path)
    return tokenizer.placeholder(config.tokenizer.train_vocab_size or 1)


def _parts(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """The weights of each layer, and at the end those outside of layers."""
    parts = [list(layer.parameters()) for layer in layers_of(model)]
    inside = {id(each) for part in parts for each in part}
    return [*parts, [each for each in model.parameters() if id(each) not in inside]]


def _unit(parameters: list[nn.Parameter], shards: int) -> Unit:
    held = sum(math.ceil(each.shape[0] / shards) * (each.numel() // max(1, each.shape[0])) for each in parameters)
    return Unit(sum(each.numel() for each in parameters), held)


def active(model: PreTrainedModel) -> int | None:
    """Parameters that a token passes through: of experts only those it is sent to. None if their number is not known.

    Experts are tensors or modules within one of the name `experts`; the configuration says how many there are, and how
    many each token has.
    """
    settings = model.config.get_text_config()
    named = dict(model.named_parameters())
    experts = sum(each.numel() for name, each in named.items() if "experts" in name.split("."))
    total = sum(each.numel() for each in named.values())
    if not experts:
        return total
    of, chosen = (first_number(settings, names) for names in (EXPERTS, CHOSEN))
    return None if not of or not chosen else total - experts + experts * min(chosen, of) // of


# ----- the command


def run(config: Config, processes: int = 1, sharding: str | None = None, memory: int | None = None) -> dict[str, Any]:
    """What `train-loop estimate` tells; `memory` is that of a GPU in bytes, without which it is this machine's device.

    Raises InputError if the model cannot be made, or its layers not be measured.
    """
    sharding = sharding or ("none" if processes == 1 else "fsdp2")
    here = torch.accelerator.current_accelerator(True)
    on_cpu = here is None or parse_flag_from_env("ACCELERATE_USE_CPU")
    device = torch.device("cpu") if on_cpu or here is None else here
    target = "cpu" if on_cpu and memory is None else "gpu" if on_cpu else device.type
    room = memory or devices.memory(device)
    found = Estimate(config, device, target)
    host = _GPUS_OF_A_HOST if on_cpu else torch.accelerator.device_count()

    def plan(processes: int, micro_batch_size: int) -> Plan:
        shards = {"none": 1, "fsdp2": processes, "hsdp": math.gcd(processes, host)}[sharding]
        return Plan(processes, sharding, shards, micro_batch_size, config.batch.sequences_per_step)

    def takes(each: Plan) -> dict[str, Any]:
        parts = found.parts(each)
        needs = parts["peak of a step"] + OWN_BYTES
        if target == "cpu":  # all processes share one machine
            copies = each.processes if sharding != "none" else 1
            needs = each.processes * needs + copies * parts["copy that is saved"]
        return {"processes": each.processes, "micro_batch_size": each.micro_batch_size} | {
            "peak_bytes": round(parts["peak of a step"]),
            "fits": needs <= room,
        }

    asked = plan(processes, config.micro_batch_size)
    sizes = [2**power for power in range(config.batch.sequences_per_step.bit_length())]
    counts = sorted({processes, *(2**power for power in range(_MOST_PROCESSES.bit_length()))})
    micro_batches = [takes(plan(processes, each)) for each in sizes]
    spread: list[dict[str, Any]] = []
    for each in counts if sharding != "none" else [processes]:
        if each > processes and spread[-1]["fits"]:
            break
        spread.append(takes(plan(each, config.micro_batch_size)))
    units = found.units(1)
    return {
        "model_type": found.outline.config.model_type,
        "parameters": found.parameters,
        "active_parameters": active(found.outline),
        "largest_layer_parameters": max(unit.weights for unit in units),
        "layers": len(units) - 1,
        "plan": asdict(asked) | {"micro_batches": asked.micro_batches, "block_size": config.data.block_size},
        "precision": config.run.mixed_precision,
        "device": target,
        "measured_on": device.type,
        "memory_bytes": room,
        "bytes": {name: round(each) for name, each in found.parts(asked).items()},
        "fits": takes(asked)["fits"],
        "checkpoint_bytes": 12 * found.parameters,
        "checkpoints_kept": config.checkpoint.keep,
        "micro_batches": micro_batches,
        "spread": spread,
    }


def lines(found: dict[str, Any]) -> str:
    """The same as a table to read."""
    plan, active = found["plan"], found["active_parameters"]
    kind = {"none": "not sharded", "fsdp2": "FSDP2", "hsdp": f"HSDP, {plan['shards']} processes to a copy"}
    told = [
        f"{found['model_type']}, {found['parameters']:,} parameters"
        + ("" if active == found["parameters"] else f", {active:,} active for a token" if active else "")
        + f"; {found['layers']} layers, the largest unit {found['largest_layer_parameters']:,}",
        f"{_count(plan['processes'], 'process')}, {kind[plan['sharding']]}, {plan['micro_batches']} x "
        f"{plan['micro_batch_size']} x {plan['block_size']} tokens each in a step, run.mixed_precision "
        f"{found['precision']}; layers measured on {found['measured_on']}",
        "",
        "GB of each process",
    ]
    told += [f"  {name:34} {each / 1e9:10.3f}" for name, each in found["bytes"].items() if each]
    where = "this machine" if found["device"] == "cpu" else "a device"
    told += [
        "",
        f"a checkpoint takes {found['checkpoint_bytes'] / 1e9:.3f} GB on disk; the newest {found['checkpoints_kept']} "
        "and the best are kept",
        f"{where} has {found['memory_bytes'] / 1e9:.1f} GB: this {'fits' if found['fits'] else 'does not fit'} "
        f"({OWN_BYTES / 1e9} GB are left to each process for all that is no tensor)",
        "",
        f"{'processes':>9} {'micro-batch':>12} {'peak GB':>9}",
    ]
    tried = {
        (each["processes"], each["micro_batch_size"]): each for each in (*found["micro_batches"], *found["spread"])
    }
    for (processes, micro_batch_size), each in sorted(tried.items()):
        fits = "fits" if each["fits"] else "does not fit"
        told.append(f"{processes:9} {micro_batch_size:12} {each['peak_bytes'] / 1e9:9.3f}  {fits}")
    return "\n".join(told)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'es' if number > 1 else ''}"
