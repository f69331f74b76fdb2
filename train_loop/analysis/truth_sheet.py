"""The truth sheet: what a run *is*, measured before its first step, next to what was asked for.

    measure(run) -> sheet (plain values, truth.json) -> check(sheet) stops where the two contradict each other
                                                     -> table(sheet) to read

The dtypes are those of tensors that a real forward, backward and optimizer step leave behind. Changing later tokens
shows whether the model sees the future, changing one document whether it can influence another. The loss is compared
with the one that the model computes itself. Afterwards, the model and the optimizer are as they were before.
"""

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from train_loop import versions
from train_loop.analysis import plan_checks
from train_loop.analysis.step_statistics import targets_until
from train_loop.analysis.trial_step import evaluating, without_effect
from train_loop.config.schema import Config
from train_loop.data import duplicates
from train_loop.data.loader import IGNORED
from train_loop.distributed import hsdp, launch
from train_loop.distributed.collectives import describe_ranks, unsharded
from train_loop.errors import InputError, one_line
from train_loop.models import activation_checkpointing, causality, experts
from train_loop.models.building import vocabulary, without_compile
from train_loop.models.parameters import EMBEDDING, MATRIX, kind
from train_loop.ops import products
from train_loop.precision import PRECISIONS
from train_loop.rng import seed_torch
from train_loop.training.schedule import learning_rate
from train_loop.training.state import Run, StepBatches, StepContext, TrainState

_CAUSAL_TOKENS = 128  # at most so many are fed to see whether a model is causal: all their logits are held at once


def measure(run: Run) -> dict[str, Any]:
    """The truth sheet of a run that has been set up. All processes must call this.

    Raises InputError if bitwise reproducibility was asked for and a kernel can't provide it, or if the model has too
    few positions for a block.
    """
    config, context, state = run.config, run.context, run.state
    accelerator, model = context.accelerator, state.model
    try:
        with without_compile(model):
            sees = _causality(accelerator, context.objective, config, training=True)
            loss = _loss_difference(context, model, config.data.block_size)
            cross = documents_cross(accelerator, context.objective, config)
            dtypes = _dtypes(context, state, config.data.block_size)
    except IndexError as error:
        blocks = f"data.block_size {config.data.block_size}"
        problem = f"{blocks}: the {type(model).__name__} fails with so many tokens ({one_line(error)})"
        raise InputError(f"{problem}; give it more positions, or lower data.block_size") from None
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(f"run.reproducible bitwise fails with this model on this device ({one_line(error)})") from None
    total, peak = run.batches.total_steps, config.optimizer.learning_rate
    steps = {"first_step": 0, "after_warmup": min(config.schedule.warmup_steps, total - 1), "last_step": total - 1}
    rates = {name: learning_rate(step, total, peak, config.schedule) for name, step in steps.items()}
    return {
        "processes": {
            "asked": launch.asked_for() or 1,
            "present": accelerator.num_processes,
            "parallelism": hsdp.parallelism(accelerator),
            **hsdp.sizes(accelerator),
            "each": describe_ranks(accelerator),
        },
        "precision": {
            "asked": config.run.mixed_precision,
            "granted": accelerator.mixed_precision,
            **dtypes,
            "loss_scaling": accelerator.scaler is not None,
        },
        "reproducible": config.run.reproducible,
        "parameters": _parameters(state),
        "causality": sees | {"refusal": causality.refusal(model, _source(config))},
        "loss": {"path": accelerator.unwrap_model(context.objective).loss_path, **loss},
        "experts": experts.facts(accelerator.unwrap_model(context.objective).experts),
        "documents": {"isolated": config.data.isolate_documents, "cross": cross},
        "duplicates": duplicates.counts(run.data.train.ledger, run.data.validation.ledger),
        "batch": _batch(run.batches),
        "learning_rate": {"schedule": config.schedule.name, "warmup_steps": config.schedule.warmup_steps} | rates,
        "model": {
            "class": type(model).__name__,
            "attention": str(model.config._attn_implementation),
            "compiled": config.model.compile,
            "activation_checkpointing": activation_checkpointing.recomputed(model) or False,
        },
        "export": {"max_shard_size": config.export.max_shard_size, "sharded": accelerator.is_fsdp2},
        "operations_per_token": context.clock.operations,
        "products": products.told(accelerator.device),
        "data": run.data.fingerprint,
        "remarks": plan_checks.of_run(run),
        "seed": config.run.seed,
        "versions": versions.installed(),
    }


def check(sheet: dict[str, Any]) -> None:
    """Raise InputError if a sheet shows that something is not what was asked for: with both, and how to fix it."""
    found, precision, loss = sheet["processes"], sheet["precision"], sheet["loss"]
    if found["asked"] > found["present"]:
        raise InputError(f"truth sheet: asked for {found['asked']} processes, but only {found['present']} present")
    for what in ("parameters", "gradients", "moments"):
        if set(precision[what]) != {"float32"}:
            raise InputError(
                f"truth sheet: {what} are {', '.join(precision[what])} but should be float32; "
                "weights and moments must not be rounded; leave precision to run.mixed_precision"
            )
    computing = PRECISIONS[precision["granted"]].dtype
    if precision["compute"] != computing:
        raise InputError(
            f"truth sheet: run.mixed_precision {precision['asked']} should compute in {computing}, "
            f"but the model computes in {precision['compute']}; this model or device can't; use run.mixed_precision no"
        )
    parameters = sheet["parameters"]
    if parameters["in_no_group"] or parameters["in_several_groups"]:
        raise InputError(
            f"truth sheet: the optimizer does not hold {parameters['in_no_group']}, and holds "
            f"{parameters['in_several_groups']} more than once; this is a bug in train_loop, please report it"
        )
    causal = sheet["causality"]
    if causal["moved"] > causal["tolerance"]:
        raise InputError(f"truth sheet: {causal['refusal']}")
    if not math.isfinite(loss["value"]):
        raise InputError(
            f"truth sheet: the model's loss is {loss['value']} before the first step; its weights are damaged, or its "
            "configuration leads to numbers that are too large"
        )
    if not loss["difference"] <= loss["tolerance"]:
        raise InputError(
            f"truth sheet: the training loss is {loss['value']:.6f} ({loss['path']}), but the model's own is "
            f"{loss['own']:.6f}; the model adds something to its loss that train_loop does not know about; turn "
            "that off in its configuration"
        )
    if sheet["documents"]["isolated"] and sheet["documents"]["cross"]:
        raise InputError(cannot_isolate(sheet["model"]["class"], sheet["model"]["attention"]))


def cannot_isolate(name: str, attention: str) -> str:
    """The error message for documents that influence each other although they should not."""
    return (
        f"data.isolate_documents: {name} with attention {attention} lets one document influence another; "
        "use --model.attention sdpa (or eager), choose another model, or set --data.isolate_documents false"
    )


def check_reading(accelerator: Accelerator, objective: nn.Module, config: Config, source: str) -> None:
    """Refuse to evaluate a model that sees the future, or other documents although they are isolated.

    All processes must call this, with the prepared `Objective`; `source` names the model. Raises InputError.
    """
    model = accelerator.unwrap_model(objective).model
    sees = _causality(accelerator, objective, config, training=False)
    if sees["moved"] > sees["tolerance"]:
        raise InputError(causality.refusal(model, source))
    if config.data.isolate_documents and documents_cross(accelerator, objective, config):
        raise InputError(cannot_isolate(type(model).__name__, str(model.config._attn_implementation)))


def table(sheet: dict[str, Any]) -> str:
    """A sheet as lines of text to read."""
    found, precision, parameters, batch = (sheet[name] for name in ("processes", "precision", "parameters", "batch"))
    model, documents, rates = (sheet[name] for name in ("model", "documents", "learning_rate"))
    hosts = Counter(each["host"] for each in found["each"])
    devices = Counter(each["name"] for each in found["each"])
    weights, gradients, moments = (" and ".join(precision[name]) for name in ("parameters", "gradients", "moments"))
    bitwise = sheet["reproducible"] == "bitwise"
    idle = max(0, found["present"] - batch["micro_batches_per_step"])
    sizes = " x ".join(f"{name} {found[name]}" for name in hsdp.SIZES if name in found)
    rows = {
        "processes": f"{found['present']} of {found['asked']} asked for, "
        + (f"{found['parallelism']} ({sizes})" if sizes else found["parallelism"])
        + ", on "
        + ", ".join(f"{host} ({count})" for host, count in hosts.items()),
        "devices": ", ".join(f"{count} x {name}" for name, count in devices.items())
        + f", {found['each'][0]['threads']} CPU threads each",
        "products": products.in_words(sheet["products"]),
        "precision": f"{precision['asked']} asked for; computes in {precision['compute']}, weights {weights}, "
        f"gradients {gradients}, moments {moments}" + (", loss scaled" if precision["loss_scaling"] else ""),
        "reproducible": "to the bit, on any number of processes" if bitwise else "to rounding",
        "model": f"{model['class']}, attention {model['attention']}"
        + (", compiled" if model["compiled"] else "")
        + activation_checkpointing.in_words(model["activation_checkpointing"]),
        "parameters": f"{parameters['total']:,}"
        + "".join(f"; tied: {' = '.join(names)}" for names in parameters["tied"])
        + (f"; frozen: {len(parameters['frozen'])}" if parameters["frozen"] else ""),
        "weight decay": "; ".join(
            f"{group['weight_decay']} for {group['numbers']:,} in {len(group['names'])} tensors"
            for group in parameters["groups"]
        )
        + "".join(f"; of several dimensions, but {why}: {_some(names)}" for why, names in parameters["exempt"].items()),
        "causality": "no earlier logit moves if later tokens change"
        + (f", but by rounding ({sheet['causality']['moved']:.0e})" if sheet["causality"]["moved"] else ""),
        "loss": f"{sheet['loss']['path']}, {sheet['loss']['difference']:.1e} from the model's own",
        "experts": experts.in_words(sheet["experts"]),
        "documents": ("isolated" if documents["isolated"] else "packed")
        + (": one influences the next" if documents["cross"] else ": none influences another"),
        "duplicates": "{shared:,} of {validation:,} validation documents are also training documents; {repeated:,} of "
        "{train:,} training documents occurred before; {dropped:,} left out".format(**sheet["duplicates"]),
        "a step": f"{batch['sequences_per_step']} sequences of {batch['block_size']} in "
        f"{batch['micro_batches_per_step']} micro-batches of {batch['micro_batch_size']}, at most "
        f"{batch['micro_batches_per_process']} per process"
        + (f"; {idle} processes have nothing to do: lower batch.micro_batch_size" if idle else ""),
        "the run": f"{batch['steps']:,} steps, {batch['steps_per_epoch']:,} per epoch; {batch['targets']:,} targets, "
        f"{batch['targets_per_epoch']:,} per epoch",
        "learning rate": f"{rates['first_step']:.3g} at first, {rates['after_warmup']:.3g} after "
        f"{min(rates['warmup_steps'], batch['steps'] - 1)} steps of warm-up, {rates['last_step']:.3g} at the end "
        f"({rates['schedule']})",
    }
    if sheet["export"]["sharded"]:
        rows["export"] = (
            f"files of at most {sheet['export']['max_shard_size']}; a clean process compares all weights, and loss and "
            f"tokens if more than {4 * parameters['total'] / 1e9:,.1f} GB of memory are free at the end"
        )
    rows = {name: text for name, text in rows.items() if text}
    lines = [*rows.items(), *(("careful", remark) for remark in sheet["remarks"])]
    return "\n".join(f"{name:13}  {text}" for name, text in lines)


def _some(names: list[str]) -> str:
    """A few names of many."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _source(config: Config) -> str:
    """What a run's model comes from, in words."""
    if config.model.name_or_path is not None:
        return f"model {config.model.name_or_path}"
    return "the model" if config.model.architecture is None else "model.architecture"


def _causality(accelerator: Accelerator, objective: nn.Module, config: Config, training: bool) -> dict[str, Any]:
    """How far changed later tokens move earlier logits, as the model trains or evaluates, and how far they may.

    If it computes in half precision, whose rounding hides a lot, it is tried in fp32, too, unless the kernels cannot.
    """
    model, device = accelerator.unwrap_model(objective).model, accelerator.device
    length, known = min(_CAUSAL_TOKENS, config.data.block_size), vocabulary(model)
    positions = torch.arange(length, device=device)[None] if config.data.isolate_documents else None

    def as_used(ids: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        ids = ids.to(device)
        seed_torch(device, "causality")  # each time the same dropout
        objective(ids, ids, positions, visit=lambda logits, targets: found.append(logits))
        return torch.cat(found)

    def in_fp32(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids.to(device), use_cache=False).logits[0].float()

    computing = getattr(torch, PRECISIONS[accelerator.mixed_precision].dtype)
    with evaluating(objective):
        objective.train(training)
        moved, tolerance = causality.movement(as_used, known, length), causality.tolerance(computing)
        objective.eval()
        if computing != torch.float32 and "flash" not in str(model.config._attn_implementation) and moved <= tolerance:
            with unsharded(accelerator, objective):
                exactly = causality.movement(in_fp32, known, length)
            if exactly > causality.tolerance(torch.float32):
                moved, tolerance = exactly, causality.tolerance(torch.float32)
    if moved <= tolerance:
        causality.passed(model)
    return {"moved": moved, "tolerance": tolerance, "tokens": length}


def documents_cross(accelerator: Accelerator, objective: nn.Module, config: Config) -> bool:
    """Whether changing all tokens of a document changes the losses of another one in its block, or of another row.

    All processes must call this.
    """
    length = config.data.block_size
    if length < 3:
        return False
    border = length // 2
    inputs = _tokens(accelerator, objective, 2, length)
    targets = inputs.roll(-1, 1)
    targets[:, -1] = IGNORED
    targets[0, :border] = IGNORED  # only the second document of row 0 and row 1 count
    positions = None
    if config.data.isolate_documents:
        positions = torch.arange(length, device=inputs.device).repeat(2, 1)
        positions[:, border:] -= border
    changed = inputs.clone()
    changed[0, :border] = (changed[0, :border] + 1) % vocabulary(accelerator.unwrap_model(objective).model)
    with evaluating(objective):
        first, other, again = (
            float(objective(each, targets, positions, statistics=True).nll) for each in (inputs, changed, inputs)
        )
    return abs(first - other) > 2 * abs(first - again)  # a GPU may not give the same bits twice


def _tokens(accelerator: Accelerator, objective: nn.Module, rows: int, length: int) -> torch.Tensor:
    """Made-up token ids [rows, length], the same on every process."""
    shape, generator = (rows, length), torch.Generator().manual_seed(0)
    known = vocabulary(accelerator.unwrap_model(objective).model)
    return torch.randint(0, known, shape, generator=generator).to(accelerator.device)


def _loss_difference(context: StepContext, model: PreTrainedModel, block_size: int) -> dict[str, Any]:
    """The training loss of a made-up batch, and the loss that the model itself computes from labels.

    The balance of experts is part of neither.
    Most models compare their logits with the labels one place on; decoders such as BART's expect labels moved already.
    """
    accelerator, objective = context.accelerator, context.objective
    if block_size < 2:  # the model's own loss leaves out a row's first token, and there is no other
        return {"value": 0.0, "own": 0.0, "difference": 0.0, "tolerance": 0.0}
    inputs = _tokens(accelerator, objective, 2, block_size)
    targets = inputs.roll(-1, 1)
    targets[:, -1] = IGNORED
    with evaluating(objective):
        value = float(objective(inputs, targets)) / int((targets != IGNORED).sum())
        with unsharded(accelerator, objective), accelerator.autocast(), experts.without_own_balance(model):

            def loss(labels: torch.Tensor) -> float:
                return float(model(input_ids=inputs, labels=labels, use_cache=False).loss)

            own, tolerance = loss(inputs), PRECISIONS[accelerator.mixed_precision].same_loss
            only_first = torch.full_like(inputs, IGNORED)
            only_first[:, 0] = inputs[:, 0]
            # Whoever moves the labels has none left of these, and so no finite mean.
            if not abs(value / own - 1) <= tolerance and 0 < loss(only_first) < math.inf:
                own = loss(targets)
    return {"value": value, "own": own, "difference": abs(value / own - 1), "tolerance": tolerance}


def _dtypes(context: StepContext, state: TrainState, block_size: int) -> dict[str, Any]:
    """The dtypes of forward, backward and optimizer, as found after one step that changes nothing."""
    computed: list[str] = []
    modules = state.model.modules()
    layers = [each for each in modules if isinstance(each, nn.Linear | nn.Conv1d) or type(each).__name__ == "Conv1D"]
    inputs = _tokens(context.accelerator, context.objective, 1, block_size)
    with without_effect(state.optimizer) as step:
        with ExitStack() as hooks:  # a part that sees or hears may not take part
            for layer in layers:
                # Routers return more than a tensor.
                hook = layer.register_forward_hook(
                    lambda *seen: computed.extend(_dtype_counts(each for each in seen[-1:] if torch.is_tensor(each)))
                )
                hooks.callback(hook.remove)
            context.objective(inputs, inputs).backward()
        gradients = _dtype_counts(each.grad for each in state.parameters if each.grad is not None)
        step()
        states = state.optimizer.state.values()
        moments = _dtype_counts(each[name] for each in states for name in ("exp_avg", "exp_avg_sq"))
    parameters = _dtype_counts(context.objective.parameters())
    return {"compute": computed[0], "parameters": parameters, "gradients": gradients, "moments": moments}


def _dtype_counts(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    return Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def _parameters(state: TrainState) -> dict[str, Any]:
    """Every parameter, by the optimizer group that holds it; matched by identity."""
    every: dict[int, list[str]] = {}
    for name, parameter in state.model.named_parameters(remove_duplicate=False):
        every.setdefault(id(parameter), []).append(name)
    frozen = {id(parameter) for parameter in state.model.parameters() if not parameter.requires_grad}
    groups = [
        {
            "weight_decay": group["weight_decay"],
            "numbers": sum(parameter.numel() for parameter in group["params"]),
            "names": [every.get(id(parameter), ["?"])[0] for parameter in group["params"]],
        }
        for group in state.optimizer.param_groups
    ]
    held = Counter(map(id, state.parameters))
    exempt: dict[str, list[str]] = {}
    for prefix, owner in state.model.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            what = kind(owner, name, parameter)
            if parameter.ndim > 1 and what not in (MATRIX, EMBEDDING) and parameter.requires_grad:
                exempt.setdefault(what, []).append(name)
    return {
        "total": sum(parameter.numel() for parameter in state.model.parameters()),
        "tied": [names for names in every.values() if len(names) > 1],
        "groups": groups,
        "rule": "matrices decay, embeddings if optimizer.decay_embeddings; the type of a parameter's module decides",
        "exempt": exempt,
        "untrained_rows": {
            name: each.padding_idx
            for name, each in state.model.named_modules()
            if isinstance(each, nn.Embedding) and each.padding_idx is not None
        },
        "frozen": _names(every, frozen),
        "in_no_group": _names(every, every.keys() - held.keys() - frozen),
        "in_several_groups": _names(every, (each for each, count in held.items() if count > 1)),
    }


def _batch(batches: StepBatches) -> dict[str, Any]:
    plan, windows = batches.plan, batches.windows
    micro_batches = -(-plan.sequences_per_step // plan.micro_batch_size)
    return {
        "sequences_per_step": plan.sequences_per_step,
        "micro_batch_size": plan.micro_batch_size,
        "micro_batches_per_step": micro_batches,
        "micro_batches_per_process": -(-micro_batches // batches.world_size),
        "block_size": windows.block_size,
        "targets_per_full_step": windows.targets(plan.blocks(0)),
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": batches.total_steps,
        "targets_per_epoch": windows.store.ledger.trained_targets,
        "targets": targets_until(batches, batches.total_steps),
    }


def _names(every: dict[int, list[str]], chosen: Iterable[int]) -> list[str]:
    return sorted(every[each][0] for each in chosen if each in every)
