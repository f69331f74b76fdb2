"""The report's plots as PNGs for papers, one per figure, drawn by matplotlib from the same data as the page."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from train_loop.errors import InputError, one_line
from train_loop.step_parts import STEP_PARTS

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b65d93", "#d98e00", "#56b4e9", "#6b5bb5", "#8b939e")

# (file, y axis, curves as (key, label, factor), logarithmic, from zero)
_LINES: tuple[tuple[Any, ...], ...] = (
    ("loss", "loss (nats per token)", (("loss", "training", 1), ("validation_loss", "validation", 1)), False, False),
    ("validation_perplexity", "validation perplexity", (("validation_perplexity", "", 1),), True, False),
    ("bits_per_byte", "validation bits per byte", (("validation_bits_per_byte", "", 1),), False, False),
    ("accuracy", "next-token accuracy (%)", (("validation_accuracy", "", 100),), False, False),
    ("learning_rate", "learning rate", (("learning_rate", "", 1),), False, False),
    ("gradient_norm", "gradient norm", (("grad_norm", "", 1),), True, False),
    ("throughput", "tokens per second", (("tokens_per_second", "", 1),), False, True),
    ("mfu", "model FLOPs utilisation (%)", (("mfu", "", 100),), False, True),
    ("memory", "peak memory (GB)", (("peak_memory_bytes", "", 1e-9),), False, True),
    ("logits_entropy", "entropy of the predictions (nats)", (("logits_entropy", "", 1),), False, False),
    ("logits_z", "mean log-sum-exp of the logits", (("logits_z", "", 1),), False, False),
    ("balance_loss", "balance of experts", (("balance_loss", "", 1),), False, False),
    ("gradient_noise_scale", "gradient noise scale (tokens)", (("gradient_noise_scale", "", 1),), True, False),
)
# (file, group, table, rows, meaning of the colour)
_HEAT_MAPS = (
    ("layer_gradient_norm", "layers", "grad_norm", "layer", "gradient norm"),
    ("layer_update_ratio", "layers", "update_ratio", "layer", "update / weight"),
    ("layer_activation_rms", "layers", "activation_rms", "layer", "activation RMS"),
    ("layer_dead_units", "layers", "dead_units", "layer", "share of dead units"),
    ("attention_entropy", "heads", "attention_entropy", "layer.head", "attention entropy (nats)"),
    ("expert_tokens", "experts", "tokens", "layer.expert", "share of tokens"),
    ("expert_probability", "experts", "probability", "layer.expert", "share of probability"),
)
_STYLE: dict[Any, Any] = {
    "figure.figsize": (5.5, 3.4),
    "figure.dpi": 200,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8b939e",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every figure that there is data for into `folder`, and return the files.

    Raises InputError if matplotlib is missing or the folder can't be written to.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--png draws with matplotlib, which is not installed: pip install 'train-loop[report]'"
        ) from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_STYLE):
            for name, paint in _figures(data["runs"]):
                figure = Figure(layout="constrained")
                if paint(figure.subplots()):
                    written.append(folder / f"{name}.png")
                    figure.savefig(written[-1])
    except OSError as error:
        raise InputError(f"--png {folder}: cannot be written to ({one_line(error)}); name another folder") from None
    return written


def _figures(runs: list[dict[str, Any]]) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """Each figure's name, and a function that paints it onto axes and returns whether there was anything to paint."""
    for name, *spec in _LINES:
        yield name, partial(_paint_lines, runs, *spec)
    for place, run in enumerate(runs):  # figures of layers and of parts show one run each
        suffix = "" if len(runs) == 1 else f"-{place + 1}"
        yield f"time{suffix}", partial(_paint_time, run)
        for name, *where in _HEAT_MAPS:
            yield f"{name}{suffix}", partial(_paint_heat, run, *where)
        for name, label in (("by_position", "position in the block"), ("by_frequency", "tokens by frequency")):
            yield f"loss_{name}{suffix}", partial(_paint_bins, run[name], label)


def _floats(values: list[float | None], factor: float = 1.0) -> list[float]:
    return [math.nan if value is None else value * factor for value in values]


def _paint_lines(
    runs: list[dict[str, Any]], label: str, curves: Any, logarithmic: bool, from_zero: bool, axes: Any
) -> bool:
    """Draw curves. Each run has its own colour; if there is only one run, each curve does."""
    several, drawn = len(runs) > 1, 0
    for place, run in enumerate(runs):
        for order, (key, kind, factor) in enumerate(curves):
            if (curve := run["curves"].get(key)) is None:
                continue
            style: dict[str, Any] = {"linewidth": 0.8} if len(curve["step"]) > 60 else {"linewidth": 1.4, "marker": "."}
            style["color"] = COLORS[(place if several else order) % len(COLORS)]
            style["linestyle"] = "--" if several and order else "-"
            name = ", ".join(each for each in (run["name"] if several else "", kind) if each)
            # matplotlib reads formulas between dollar signs, and leaves out labels that begin with an underscore.
            axes.plot(curve["step"], _floats(curve["value"], factor), label=" " + name.replace("$", r"\$"), **style)
            drawn += 1
    axes.set(xlabel="step", ylabel=label)
    if logarithmic:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(bottom=0)
    if drawn > 1:
        axes.legend()
    return drawn > 0


def _paint_time(run: dict[str, Any], axes: Any) -> bool:
    """Draw the parts of a step's time as stacked areas."""
    if (time := run["time"]) is None:
        return False
    colors = dict(zip((*STEP_PARTS, "other"), COLORS, strict=False))
    parts = {part: _floats(time["parts"][part], 1e3) for part in colors if any(time["parts"][part])}
    axes.stackplot(time["step"], list(parts.values()), labels=parts, colors=[colors[part] for part in parts])
    axes.set(xlabel="step", ylabel="time of a step (ms)")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    return True


def _paint_heat(run: dict[str, Any], group: str, table: str, rows: str, label: str, axes: Any) -> bool:
    """Draw a table as a heat map, with a logarithmic scale if its values differ by more than a factor of 20."""
    found = run[group]
    if found is None or table not in found["tables"]:
        return False
    values = [_floats(row) for row in found["tables"][table]]
    numbers = [value for row in values for value in row if value == value]
    norm = "log" if min(numbers) > 0 and max(numbers) / min(numbers) > 20 else "linear"
    places = [place - 0.5 for place in range(len(values) + 1)]
    mesh = axes.pcolormesh([0, *found["step"]], places, values, cmap="cividis", norm=norm, rasterized=True)
    stride = -(-len(values) // 16)
    axes.set_yticks(range(0, len(values), stride), found["rows"][::stride])
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="step", ylabel=rows)
    axes.figure.colorbar(mesh, label=label)
    return True


def _paint_bins(found: dict[str, Any] | None, label: str, axes: Any) -> bool:
    """Draw losses by bin, one line for each of up to five steps."""
    if found is None:
        return False
    bins, steps = found["bins"], found["step"]
    x = bins if all(isinstance(each, int | float) for each in bins) else list(range(len(bins)))
    chosen = sorted({round(place * (len(steps) - 1) / 4) for place in range(5)})
    for order, place in enumerate(chosen):
        values = _floats(found["values"][place])
        axes.plot(x[: len(values)], values, marker=".", color=COLORS[order], label=f"step {steps[place]:,}")
    if x is not bins:
        axes.set_xticks(x, [str(each).replace("$", r"\$") for each in bins])
    axes.set(xlabel=label, ylabel="loss (nats per token)")
    axes.legend()
    return True
