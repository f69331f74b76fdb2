"""One or more runs as the plain data that a page or a figure is drawn from.

Curves are {"step", "value"}; if a curve was thinned, it also has {"mean_step", "mean"}. `axis` gives the x values: for
a step, how many tokens had been trained on and how long the steps had taken. Layers, heads and parameters are tables
[row][time].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train_loop.report.downsample import MOST_POINTS, ends, evenly, extremes, kept, means, rounded
from train_loop.report.run_reader import RunFiles, number
from train_loop.step_parts import STEP_PARTS
from train_loop.versions import __version__

Floats = NDArray[np.float64]
Columns = dict[str, Floats]
Event = dict[str, Any]

CURVES = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes", "epoch"),
    *("loss_scale", "fixed_point_rounding", "balance_loss"),
)
LAYER = ("grad_norm", "update_ratio", "weight_norm", "activation_rms", "activation_outliers", "dead_units")
PARAMETER = ("grad_norm", "update_ratio", "weight_norm", "second_moment")
EVALUATION = ("loss", "perplexity", "bits_per_byte", "accuracy")
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
    clipped = columns["grad_norm"] > number(config.get("optimizer.max_grad_norm"))
    skipped = columns["skipped"] > 0
    statistics = _in_order(files.events.get("statistics", []))
    evaluations = _in_order(files.events.get("evaluation", []))
    curves = {key: _curve(columns["step"], columns[key]) for key in CURVES}
    curves |= {f"validation_{key}": _curve(*_picked(evaluations, key)) for key in EVALUATION}
    curves |= {f"logits_{key}": _curve(*_picked(statistics, "logits", key)) for key in LOGITS}
    curves |= {key: _curve(*_picked(statistics, key)) for key in ("gradient_noise_scale", "clipped_share")}
    return {
        "name": name,
        "folder": str(files.folder),
        "notes": files.notes + _not_finite(evaluations),
        "status": _status(files.documents["status"]),
        "totals": _totals(columns, config, truth) | {"clipped": int(clipped.sum()), "skipped": int(skipped.sum())},
        "axis": _axis(columns),
        "curves": {key: curve for key, curve in curves.items() if any(v is not None for v in curve["value"])},
        "marks": {"clipped": _marks(columns, clipped & ~skipped), "skipped": _marks(columns, skipped)},
        "time": _time(columns),
        "layers": _table(statistics, "layers", LAYER),
        "heads": _numbered(statistics, "layers", ["attention_entropy"]),
        "experts": _numbered(statistics, "experts", ["tokens", "probability"]),
        "parameters": _table(statistics, "parameters", PARAMETER),
        "by_position": _lines(statistics, "loss_by_position", "position_bins"),
        "by_frequency": _lines(statistics, "loss_by_frequency", "frequency_bins"),
        "probe": _probe(_in_order(files.events.get("probe", []))),
        "samples": [
            {"step": event["step"]} | {key: str(event.get(key, "")) for key in ("prompt", "continuation")}
            for event in _some(files.events.get("sample", []), MOST_SAMPLES)
        ],
        "ledger": {
            split: _flat(book)
            for split in ("train", "validation")
            if (book := _mapping(_at(files.documents["ledger"], split)))
        },
        "config": config,
        "truth": {key: value for key, value in _flat(truth).items() if not key.startswith("parameters.groups")},
        "groups": _groups(truth),
    }


def _status(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """State and reason as text, the step as a number."""
    if not found:
        return None
    step = number(found.get("step"))
    return {key: str(found.get(key) or "") for key in ("state", "reason")} | {"step": None if step != step else step}


def _not_finite(evaluations: list[Event]) -> list[str]:
    """Why the last evaluation has no loss, if it has none."""
    if not evaluations or evaluations[-1].get("loss", 0.0) is not None:
        return []
    reason = evaluations[-1].get("reason") or "the loss is not finite"
    return [f"validation after step {evaluations[-1]['step']:,}: {reason}"]


def _columns(files: RunFiles) -> Columns:
    """The columns in order of steps, each step once, with running sums of tokens and seconds."""
    columns = {name: np.array(column, dtype=np.float64) for name, column in files.steps.items()}
    step = columns["step"]
    if len(step) and not (np.diff(step) > 0).all():
        _, last = np.unique(step[::-1], return_index=True)  # a step's last line counts
        columns = {name: column[len(step) - 1 - last] for name, column in columns.items()}
    if len(step := columns["step"]) and (holes := np.flatnonzero(np.diff(step, prepend=0) > 1)).size:
        # A step without numbers breaks each curve where steps have no lines.
        columns = {name: np.insert(column, holes, np.nan) for name, column in columns.items()}
        columns["step"][holes + np.arange(holes.size)] = step[holes] - 1
    for name in ("tokens", "seconds"):
        values = columns[name]
        columns[f"{name}_so_far"] = np.cumsum(np.where((values >= 0) & (values < 1e15), values, 0.0))
    return columns


def _totals(columns: Columns, config: dict[str, Any], truth: dict[str, Any] | None) -> dict[str, Any]:
    """The numbers of a run's summary."""
    last = {name: column[-1] if len(column) else math.nan for name, column in columns.items()}
    whole = number(_at(truth, "batch", "steps"))
    found = {
        "step": last["step"],
        "steps": whole if whole == whole else number(config.get("train.max_steps")),
        "epoch": last["epoch"],
        "tokens": last["tokens_so_far"],
        "seconds": last["seconds_so_far"],
        "targets": number(_at(truth, "batch", "targets")),
        "parameters": number(_at(truth, "parameters", "total")),
        "max_grad_norm": number(config.get("optimizer.max_grad_norm")),
        "tokens_per_second": _of_known(np.nanmedian, columns["tokens_per_second"]),
        "mfu": _of_known(np.nanmedian, columns["mfu"]),
        "peak_memory_bytes": _of_known(np.nanmax, columns["peak_memory_bytes"]),
    }
    return dict(zip(found, rounded(list(found.values()), 10), strict=True))


def _any(values: Floats) -> bool:
    return bool((~np.isnan(values)).any())


def _of_known(reduce: Callable[[Floats], Any], values: Floats) -> float:
    return float(reduce(values)) if _any(values) else math.nan


def _axis(columns: Columns) -> dict[str, list[float | None]]:
    """Steps, thinned, with the tokens and the seconds up to each of them."""
    chosen = evenly(len(columns["step"]), MOST_POINTS)
    names = {"step": "step", "tokens": "tokens_so_far", "seconds": "seconds_so_far"}
    return {key: [0.0, *rounded(columns[name][chosen], 10)] for key, name in names.items()}


def _curve(steps: Floats, values: Floats) -> dict[str, list[float | None]]:
    """A curve, thinned if it is long."""
    chosen = kept(values)
    curve = {"step": rounded(steps[chosen], 12), "value": rounded(values[chosen])}
    if len(chosen) < len(values):
        places, mean = means(values, MOST_POINTS // 2)
        curve |= {"mean_step": rounded(steps[places], 12), "mean": rounded(mean)}
    return curve


def _marks(columns: Columns, which: NDArray[np.bool_]) -> dict[str, list[float | None]]:
    """Some steps and their gradient norms, for marks in the plot of the gradient norm."""
    places = np.flatnonzero(which)
    places = places[evenly(len(places), MOST_POINTS)]
    return {"step": rounded(columns["step"][places], 12), "value": rounded(columns["grad_norm"][places])}


def _time(columns: Columns) -> dict[str, Any] | None:
    """Seconds per step of each part, as means over at most 160 buckets; `other` is what no part accounts for."""
    parts = {part: columns[f"{part}_seconds"] for part in STEP_PARTS}
    if not any(_any(values) for values in parts.values()):
        return None
    found = {part: means(values, TIME_BUCKETS)[1] for part, values in parts.items()}
    places, whole = means(columns["seconds"], TIME_BUCKETS)
    found["other"] = np.maximum(whole - np.nansum(list(found.values()), axis=0), 0.0)
    return {
        "step": rounded(columns["step"][places], 12),
        "parts": {part: rounded(np.nan_to_num(values), 4) for part, values in found.items()},
    }


def _in_order(events: list[Event]) -> list[Event]:
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


def _picked(events: list[Event], *keys: str) -> tuple[Floats, Floats]:
    """The events' steps, and one number of each event."""
    values = [number(_at(event, *keys)) for event in events]
    return np.array([event["step"] for event in events], np.float64), np.array(values, np.float64)


def _natural(names: Iterable[str]) -> list[str]:
    """Layers in order of their numbers; other names in the given order."""
    found = list(names)
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def _table(events: list[Event], group: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    """Tables [row][time] of statistics of layers or parameters, thinned to the highest value of each bucket."""
    rows = _natural(dict.fromkeys(str(name) for event in events for name in _mapping(event.get(group))))
    return _tables(events, rows, metrics, lambda event, row, metric: _at(event, group, row, metric))


def _tables(
    events: list[Event],
    rows: list[str],
    metrics: Sequence[str],
    cell: Callable[[Event, str, str], Any],
    lowest: bool = False,
) -> dict[str, Any] | None:
    """One table [row][time] for each metric, thinned to the highest (or lowest) value of each bucket."""
    if not rows:
        return None
    columns = max(1, min(MOST_COLUMNS, MOST_CELLS // len(rows)))
    tables = {}
    for metric in metrics:
        table = np.array([[number(cell(event, row, metric)) for event in events] for row in rows], np.float64)
        if _any(table):
            tables[metric] = [rounded(row, 4) for row in extremes(table, columns, lowest)]
    steps = [events[place]["step"] for place in ends(len(events), columns)]
    return {"rows": rows, "step": steps, "thinned": len(steps) < len(events), "tables": tables}


def _numbered(events: list[Event], group: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    """Tables of every head's entropy in nats, or every expert's shares [layer.number][time], thinned to the lowest."""
    counts: dict[str, int] = {}
    for event in events:
        for layer, values in _mapping(event.get(group)).items():
            counts[str(layer)] = max(counts.get(str(layer), 0), *(len(_list(_at(values, each))) for each in metrics))

    def cell(event: Event, row: str, metric: str) -> Any:
        layer, place = row.rsplit(".", 1)
        values = _list(_at(event, group, layer, metric))
        return values[int(place)] if int(place) < len(values) else None

    rows = [f"{layer}.{place}" for layer in _natural(counts) for place in range(counts[layer])]
    return _tables(events, rows, metrics, cell, lowest=True)


def _lines(events: list[Event], key: str, bins: str) -> dict[str, Any] | None:
    """Losses by position or frequency at a few steps, among them the first and the last."""
    chosen = _some([event for event in events if _list(event.get(key))], MOST_LINES)
    if not chosen:
        return None
    names = [each if number(each) == each else str(each) for each in _list(chosen[-1].get(bins))]
    return {
        "bins": names,
        "step": [event["step"] for event in chosen],
        "values": [rounded([number(value) for value in event[key][: len(names)]], 5) for event in chosen],
    }


def _probe(events: list[Event]) -> dict[str, Any] | None:
    """The probe's tokens at no more than 100 steps. `strings` holds every distinct string once."""
    strings: dict[str, int] = {}

    def place(text: Any) -> int:
        return strings.setdefault(str(text), len(strings))

    chosen = []
    for event in _some(events, MOST_PROBES):
        tokens = _list(event.get("tokens"))
        losses = [number(loss) for loss in _list(event.get("losses"))]
        likeliest = [[each for each in _list(top) if isinstance(each, list)] for top in _list(event.get("top"))]
        top = [
            [[place(each[0]), *rounded([number(each[1])], 3)] for each in top if len(each) == 2] for top in likeliest
        ]
        seen = {"tokens": [place(token) for token in tokens], "losses": rounded(losses[: len(tokens)], 4)}
        chosen.append({"step": event["step"], **seen, "top": top[: len(tokens)]})
    return {"strings": list(strings), "events": chosen} if chosen else None


def _some(events: list[Event], most: int) -> list[Event]:
    return [events[place] for place in evenly(len(events), most)]


def _groups(truth: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The optimizer's groups: weight decay, count of numbers, names of tensors."""
    return [
        {key: group.get(key) for key in ("weight_decay", "numbers")} | {"names": [*map(str, _list(group.get("names")))]}
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
        elif isinstance(each, str | int) or each is None or (isinstance(each, float) and math.isfinite(each)):
            flat[f"{prefix}{key}"] = each
        else:
            flat[f"{prefix}{key}"] = str(each)
    return flat
