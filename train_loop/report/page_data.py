"""One or more runs as the plain data that a page or a figure is drawn from.

Curves are {"step", "value"}; if a curve was thinned, it also has {"mean_step", "mean"}. `axis` gives the x values: for
a step, how many tokens had been trained on and how long the steps had taken. Layers, heads and parameters are tables
[row][time].
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train_loop.report import downsample
from train_loop.report.run_reader import RunFiles, number
from train_loop.step_parts import STEP_PARTS
from train_loop.versions import __version__

CURVES = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes", "epoch"),
    *("loss_scale", "fixed_point_rounding"),
)
LAYER = ("grad_norm", "update_ratio", "weight_norm", "activation_rms", "activation_outliers", "dead_units")
PARAMETER = ("grad_norm", "update_ratio", "weight_norm", "second_moment")
LOGITS = ("entropy", "top_1_probability", "z")

MOST_CELLS = 40_000  # of a table
MOST_COLUMNS = 400
MOST_PROBES = 100
MOST_SAMPLES = 200
MOST_LINES = 24  # steps with losses by position and frequency
TIME_BUCKETS = 160


def gather(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Everything that a page shows of these runs."""
    return {"version": __version__, "runs": [_run(files, name) for files, name in zip(runs, names(runs), strict=True)]}


def names(runs: Sequence[RunFiles]) -> list[str]:
    """A name for each run: as many of the last parts of its folder's path as are needed to tell the runs apart."""
    paths = [run.folder.resolve() for run in runs]
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        short = [str(Path(*path.parts[-count:])) for path in paths]
        if len(set(short)) == len(set(paths)):
            break
    return [f"{name} ({short[:place].count(name) + 1})" if short.count(name) > 1 else name
            for place, name in enumerate(short)]  # fmt: skip


def _run(files: RunFiles, name: str) -> dict[str, Any]:
    """Everything that a page shows of one run."""
    columns = _columns(files)
    config = _flat(files.documents["config"])
    truth = files.documents["truth"]
    limit = number(config.get("optimizer.max_grad_norm"))
    clipped = columns["grad_norm"] > limit
    skipped = columns["skipped"] > 0
    statistics = _in_order(files.events.get("statistics", []))
    evaluations = _in_order(files.events.get("evaluation", []))
    curves = {key: _curve(columns["step"], columns[key]) for key in CURVES}
    curves |= {
        f"validation_{key}": _curve(*_picked(evaluations, key))
        for key in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    curves |= {f"logits_{key}": _curve(*_picked(statistics, "logits", key)) for key in LOGITS}
    curves |= {key: _curve(*_picked(statistics, key)) for key in ("gradient_noise_scale", "clipped_share")}
    return {
        "name": name,
        "folder": str(files.folder),
        "notes": files.notes,
        "status": _mapping(files.documents["status"]) or None,
        "totals": _totals(columns, config, truth, limit)
        | {"clipped": int(clipped.sum()), "skipped": int(skipped.sum())},
        "axis": _axis(columns),
        "curves": {key: curve for key, curve in curves.items() if any(v is not None for v in curve["value"])},
        "marks": {
            "clipped": _marks(columns, clipped & ~skipped),
            "skipped": _marks(columns, skipped),
        },
        "time": _time(columns),
        "layers": _table(statistics, "layers", LAYER),
        "heads": _heads(statistics),
        "parameters": _table(statistics, "parameters", PARAMETER),
        "by_position": _lines(statistics, "loss_by_position", "position_bins"),
        "by_frequency": _lines(statistics, "loss_by_frequency", "frequency_bins"),
        "probe": _probe(_in_order(files.events.get("probe", []))),
        "samples": _samples(files.events.get("sample", [])),
        "ledger": _ledger(files.documents["ledger"]),
        "config": config,
        "truth": {key: value for key, value in _flat(truth).items() if not key.startswith("parameters.groups")},
        "groups": _groups(truth),
    }


def _columns(files: RunFiles) -> dict[str, NDArray[np.float64]]:
    """The columns in order of steps, each step once, with running sums of tokens and seconds."""
    columns = {name: np.array(column, dtype=np.float64) for name, column in files.steps.items()}
    step = columns["step"]
    if len(step) and not (np.diff(step) > 0).all():
        _, last = np.unique(step[::-1], return_index=True)  # a step's last line counts
        columns = {name: column[len(step) - 1 - last] for name, column in columns.items()}
    for name in ("tokens", "seconds"):
        columns[f"{name}_so_far"] = np.cumsum(np.nan_to_num(columns[name]))
    return columns


def _totals(
    columns: dict[str, NDArray[np.float64]], config: dict[str, Any], truth: dict[str, Any] | None, limit: float
) -> dict[str, Any]:
    """The numbers of a run's summary."""
    there = len(columns["step"])
    last = {
        name: columns[name][-1] if there else math.nan for name in ("step", "epoch", "tokens_so_far", "seconds_so_far")
    }
    whole = number(_at(truth, "batch", "steps"))
    found = {
        "logged": there,
        "step": last["step"],
        "steps": whole if whole == whole else number(config.get("train.max_steps")),
        "epoch": last["epoch"],
        "tokens": last["tokens_so_far"],
        "seconds": last["seconds_so_far"],
        "targets": number(_at(truth, "batch", "targets")),
        "parameters": number(_at(truth, "parameters", "total")),
        "max_grad_norm": limit,
        "tokens_per_second": _median(columns["tokens_per_second"]),
        "mfu": _median(columns["mfu"]),
        "peak_memory_bytes": float(np.nanmax(columns["peak_memory_bytes"]))
        if _any(columns["peak_memory_bytes"])
        else math.nan,
    }
    return dict(zip(found, downsample.rounded(list(found.values()), 10), strict=True))


def _any(values: NDArray[np.float64]) -> bool:
    return bool((~np.isnan(values)).any())


def _median(values: NDArray[np.float64]) -> float:
    return float(np.nanmedian(values)) if _any(values) else math.nan


def _axis(columns: dict[str, NDArray[np.float64]]) -> dict[str, list[float | None]]:
    """Steps, thinned, with the tokens and the seconds up to each of them."""
    chosen = downsample.evenly(len(columns["step"]), downsample.MOST_POINTS)
    names = {"step": "step", "tokens": "tokens_so_far", "seconds": "seconds_so_far"}
    return {key: [0.0, *downsample.rounded(columns[name][chosen], 10)] for key, name in names.items()}


def _curve(steps: NDArray[np.float64], values: NDArray[np.float64]) -> dict[str, list[float | None]]:
    """A curve, thinned if it is long."""
    chosen = downsample.kept(values)
    curve = {"step": downsample.rounded(steps[chosen], 12), "value": downsample.rounded(values[chosen])}
    if len(chosen) < len(values):
        places, mean = downsample.means(values, downsample.MOST_POINTS // 2)
        curve |= {"mean_step": downsample.rounded(steps[places], 12), "mean": downsample.rounded(mean)}
    return curve


def _marks(columns: dict[str, NDArray[np.float64]], which: NDArray[np.bool_]) -> dict[str, list[float | None]]:
    """Some steps and their gradient norms, for marks in the plot of the gradient norm."""
    places = np.flatnonzero(which)
    places = places[downsample.evenly(len(places), downsample.MOST_POINTS)]
    return {
        "step": downsample.rounded(columns["step"][places], 12),
        "value": downsample.rounded(columns["grad_norm"][places]),
    }


def _time(columns: dict[str, NDArray[np.float64]]) -> dict[str, Any] | None:
    """Seconds per step of each part, as means over at most 160 buckets; `other` is what no part accounts for."""
    parts = {part: columns[f"{part}_seconds"] for part in STEP_PARTS}
    if not any(_any(values) for values in parts.values()):
        return None
    found = {part: downsample.means(values, TIME_BUCKETS)[1] for part, values in parts.items()}
    places, whole = downsample.means(columns["seconds"], TIME_BUCKETS)
    found["other"] = np.maximum(whole - np.nansum(list(found.values()), axis=0), 0.0)
    return {
        "step": downsample.rounded(columns["step"][places], 12),
        "parts": {part: downsample.rounded(np.nan_to_num(values), 4) for part, values in found.items()},
    }


def _in_order(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events in order of steps; if a step has several, the last one."""
    return [event for _, event in sorted({event["step"]: event for event in events}.items())]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _at(value: Any, *keys: str) -> Any:
    """The value at a path of keys in nested dictionaries; None if there is none."""
    for key in keys:
        value = _mapping(value).get(key)
    return value


def _picked(events: list[dict[str, Any]], *keys: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The events' steps, and one number of each event."""
    values = [number(_at(event, *keys)) for event in events]
    return np.array([event["step"] for event in events], np.float64), np.array(values, np.float64)


def _natural(names: Iterable[str]) -> list[str]:
    """Layers in order of their numbers; other names in the given order."""
    found = list(names)
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def _table(
    events: list[dict[str, Any]], group: str, metrics: Iterable[str], lowest: bool = False
) -> dict[str, Any] | None:
    """Tables [row][time] of statistics of layers or parameters, thinned to the highest value of each bucket."""
    rows = _natural(dict.fromkeys(str(name) for event in events for name in _mapping(event.get(group))))
    if not rows:
        return None

    def cell(event: dict[str, Any], row: str, metric: str) -> float:
        return number(_at(event, group, row, metric))

    return _tables(events, rows, metrics, cell, lowest)


def _tables(
    events: list[dict[str, Any]],
    rows: list[str],
    metrics: Iterable[str],
    cell: Callable[[dict[str, Any], str, str], float],
    lowest: bool,
) -> dict[str, Any]:
    """One table [row][time] for each metric, thinned to the highest (or lowest) value of each bucket."""
    columns = max(1, min(MOST_COLUMNS, MOST_CELLS // len(rows)))
    tables = {}
    for metric in metrics:
        table = np.array([[cell(event, row, metric) for event in events] for row in rows], np.float64)
        if _any(table):
            tables[metric] = [downsample.rounded(row, 4) for row in downsample.extremes(table, columns, lowest)]
    steps = [events[place]["step"] for place in downsample.ends(len(events), columns)]
    return {"rows": rows, "step": steps, "thinned": len(steps) < len(events), "tables": tables}


def _heads(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The attention entropy of every head [layer.head][time], in nats, thinned to the lowest value of each bucket."""
    heads: dict[str, int] = {}
    for event in events:
        for layer, values in _mapping(event.get("layers")).items():
            heads[layer] = max(heads.get(layer, 0), len(_list(_at(values, "attention_entropy"))))
    rows = [f"{layer}.{head}" for layer in _natural(heads) for head in range(heads[layer])]
    if not rows:
        return None

    def cell(event: dict[str, Any], row: str, metric: str) -> float:
        layer, head = row.rsplit(".", 1)
        values = _list(_at(event, "layers", layer, metric))
        return number(values[int(head)]) if int(head) < len(values) else math.nan

    return _tables(events, rows, ["attention_entropy"], cell, lowest=True)


def _lines(events: list[dict[str, Any]], key: str, bins: str) -> dict[str, Any] | None:
    """Losses by position or frequency at a few steps, among them the first and the last."""
    having = [event for event in events if _list(event.get(key))]
    chosen = [having[place] for place in downsample.evenly(len(having), MOST_LINES)]
    if not chosen:
        return None
    return {
        "bins": [each if isinstance(each, int | float) else str(each) for each in _list(chosen[-1].get(bins))],
        "step": [event["step"] for event in chosen],
        "values": [downsample.rounded([number(value) for value in event[key]], 5) for event in chosen],
    }


def _probe(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The probe's tokens at no more than 100 steps. `strings` holds every distinct string once."""
    strings: dict[str, int] = {}

    def place(text: Any) -> int:
        return strings.setdefault(str(text), len(strings))

    chosen = []
    for number_ in downsample.evenly(len(events), MOST_PROBES):
        event = events[number_]
        tokens = _list(event.get("tokens"))
        losses = [number(loss) for loss in _list(event.get("losses"))]
        top = [
            [[place(string), downsample.rounded([number(share)], 3)[0]] for string, share in _pairs(each)]
            for each in _list(event.get("top"))
        ]
        chosen.append(
            {
                "step": event["step"],
                "tokens": [place(token) for token in tokens],
                "losses": downsample.rounded(losses[: len(tokens)], 4),
                "top": top[: len(tokens)],
            }
        )
    return {"strings": list(strings), "events": chosen} if chosen else None


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs in a list; anything else in it is left out."""
    for pair in _list(value):
        if isinstance(pair, list) and len(pair) == 2:
            yield pair[0], pair[1]


def _samples(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps, prompts and continuations of at most `MOST_SAMPLES` samples."""
    keys = ("prompt", "continuation")
    return [
        {"step": events[place]["step"]} | {key: str(events[place].get(key, "")) for key in keys}
        for place in downsample.evenly(len(events), MOST_SAMPLES)
    ]


def _ledger(ledger: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {side: _mapping(_at(ledger, side)) for side in ("train", "validation") if _mapping(_at(ledger, side))}


def _groups(truth: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The optimizer's groups: weight decay, count of numbers, names of tensors."""
    return [
        {
            "weight_decay": group.get("weight_decay"),
            "numbers": group.get("numbers"),
            "names": [str(name) for name in _list(group.get("names"))],
        }
        for group in map(_mapping, _list(_at(truth, "parameters", "groups")))
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"a.b": value}, and lists of plain values as text."""
    flat: dict[str, Any] = {}
    for key, each in _mapping(value).items():
        if isinstance(each, dict) and each:
            flat |= _flat(each, f"{prefix}{key}.")
        elif isinstance(each, list) and any(isinstance(item, dict) for item in each):
            flat |= _flat({str(place): item for place, item in enumerate(each)}, f"{prefix}{key}.")
        elif isinstance(each, list):
            flat[f"{prefix}{key}"] = ", ".join(map(str, each))
        else:
            flat[f"{prefix}{key}"] = each if isinstance(each, str | bool | int) or each is None else _plain(each)
    return flat


def _plain(value: Any) -> Any:
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
