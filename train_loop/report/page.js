"use strict";
// The page: what it shows (the view), its figures, and its text.

const view = {
  data: null,
  kind: "step", // of the x axis: step, tokens or seconds
  smooth: 0, // time constant of the average, as a share of the run
  range: null, // of the x axis, if it is zoomed
  run: 0, // the run whose details are shown
  hidden: new Set(), // names of runs
  figures: [],
  parts: [], // functions that redraw everything that is not a figure
  zoom(range) {
    this.range = range;
    document.getElementById("unzoom").hidden = range === null;
    this.redraw();
  },
  redraw() {
    for (const section of document.querySelectorAll("section")) {
      const figures = this.figures.filter((each) => section.contains(each.element));
      if (!figures.length) continue;
      section.hidden = false; // a figure measures its width while it is drawn
      const drawn = figures.map((each) => each.redraw());
      section.hidden = !drawn.includes(true);
      const link = document.querySelector(`nav a[href="#${section.id}"]`);
      if (link) link.hidden = section.hidden;
    }
  },
  renew() {
    for (const part of this.parts) part();
    this.redraw();
  },
  get runs() {
    return this.data.runs.map((run, place) => ({ ...run, color: `var(--c${place % 8})` })).filter((run) => !this.hidden.has(run.name));
  },
  get chosen() {
    return this.data.runs[Math.min(this.run, this.data.runs.length - 1)];
  },
};

// ---- what figures are drawn from ------------------------------------------------------------------------------------

const UNITS = [["d", 86400, 3 * 86400], ["h", 3600, 3 * 3600], ["min", 60, 300], ["s", 1, 0]];

function timeUnit() {
  const longest = Math.max(0, ...view.data.runs.map((run) => run.totals.seconds || 0));
  return UNITS.find(([, , from]) => longest >= from);
}

/** The x axis of every plot over steps: from the beginning to the end of the longest run. */
function xAxis() {
  const ends = [...view.runs, view.chosen].map((run) => {
    const last = Math.max(run.totals.step || 0, ...Object.values(run.curves).map((each) => each.step.at(-1)));
    return xOf(run)(last) || 0;
  });
  const domain = [0, Math.max(...ends) || 1];
  if (view.kind === "tokens") return { domain, xLabel: "tokens trained on", xFormat: prefixed, xTitle: (x) => `${whole(x)} tokens` };
  if (view.kind === "seconds") {
    const [name, seconds] = timeUnit();
    return { domain, xLabel: `time in steps (${name})`, xTitle: (x) => duration(x * seconds) };
  }
  return { domain, xLabel: "step", xTitle: (x) => `step ${whole(x)}` };
}

/** A function from a run's steps to x values. */
function xOf(run) {
  const map = along(run.axis, view.kind);
  if (view.kind !== "seconds") return map;
  const [, seconds] = timeUnit();
  return (step) => map(step) / seconds;
}

/** One curve of every visible run, as series; `one`: the plot has several curves. */
function curve(key, { name = "", change = (y) => y, smooth = false, ...look } = {}) {
  return view.runs.flatMap((run) => {
    const found = run.curves[key];
    if (!found) return [];
    const map = xOf(run);
    const several = view.data.runs.length > 1;
    const series = {
      key: `${run.name}/${key}`,
      name: !several ? name : look.one ? `${run.name}, ${name}` : run.name,
      color: several || !look.color ? run.color : look.color,
      dashed: several && look.dashed,
      points: look.points,
      thin: look.thin,
      x: found.step.map(map),
      y: found.value.map((y) => (y === null ? NaN : change(y))),
    };
    if (!smooth || !view.smooth) return [series];
    const faint = { x: series.x, y: series.y };
    const base = found.mean ? { x: found.mean_step.map(map), y: found.mean.map((y) => (y === null ? NaN : change(y))) } : faint;
    const constant = view.smooth * (base.x.at(-1) - base.x[0] || 1);
    return [{ ...series, faint, x: base.x, y: smoothed(base.x, base.y, constant) }];
  });
}

const lines = (series, rest = {}) => (series.length ? { series, ...xAxis(), ...rest } : null);

/** A table of the chosen run as a heat map. */
function heat(group, metric, rowLabel, format = short) {
  const found = view.chosen[group];
  if (!found || !found.tables[metric]) return null;
  const map = xOf(view.chosen);
  return { rows: found.rows, x: found.step.map(map), values: found.tables[metric], rowLabel, format, ...xAxis() };
}

/** A table of shares as a heat map of percentages. */
function shares(metric, group = "experts", rowLabel = "expert") {
  const found = heat(group, metric, rowLabel, percent);
  return found && { ...found, values: found.values.map((row) => row.map((value) => (value === null ? null : 100 * value))) };
}

/** Rows of a table of the chosen run as lines, from cool to warm colours. */
function rowsAsLines(group, metric, name, rest) {
  const found = view.chosen[group];
  if (!found || !found.tables[metric]) return null;
  const map = xOf(view.chosen);
  const series = found.rows.map((row, place) => ({
    key: row,
    name: `${name} ${row}`,
    color: family(place, found.rows.length),
    x: found.step.map(map),
    y: found.tables[metric][place].map((y) => y ?? NaN),
    points: found.step.length < 40,
  }));
  return { series, ...xAxis(), ...rest };
}

/** Losses by bin: for one run at five steps, for several runs at their last step. */
function byBin(group, xLabel, rest = {}) {
  const having = view.runs.filter((run) => run[group]);
  if (!having.length) return null;
  const series = having.flatMap((run) => {
    const { bins, step, values } = run[group];
    const several = having.length > 1;
    const count = Math.min(5, step.length);
    const places = several ? [step.length - 1] : [...Array(count).keys()].map((each) => Math.round((each * (step.length - 1)) / Math.max(1, count - 1)));
    const x = bins.map((bin, place) => (typeof bin === "number" ? bin : place));
    return places.map((place, order) => ({
      key: several ? run.name : `step ${order}`,
      name: several ? `${run.name}, step ${whole(step[place])}` : `step ${whole(step[place])}`,
      color: several ? run.color : family(order, count),
      x,
      y: values[place].map((y) => y ?? NaN),
      points: true,
    }));
  });
  const bins = having[0][group].bins;
  const named = typeof bins[0] !== "number";
  return {
    series,
    xLabel,
    xTitle: (x) => (named ? String(bins[x] ?? "") : `position ${whole(x)}`),
    xTicks: named ? bins.map((_, place) => place) : null,
    xFormat: named ? (x) => String(bins[x] ?? "") : null,
    alwaysLegend: true,
    ...rest,
  };
}

const seconds = (value) => (value >= 1 ? short(value, 3) + " s" : short(value * 1e3, 3) + " ms");
const percent = (value) => (isNumber(value) ? short(value, 3) + " %" : "–");

// One colour for each part of a step, in order.
const PART_COLORS = ["--c6", "--c0", "--c5", "--c1", "--c4", "--c2", "--c7"];

function stepTime() {
  const found = view.chosen.time;
  if (!found) return null;
  return {
    x: found.step.map(xOf(view.chosen)),
    layers: Object.entries(found.parts)
      .map(([name, y], number) => ({ key: name, name, color: `var(${PART_COLORS[number]})`, y }))
      .filter((layer) => layer.y.some((value) => value > 0)),
    format: seconds,
    yFormat: (value) => short(value * 1e3, 3),
    ...xAxis(),
  };
}

function gradientNorm() {
  const run = view.chosen;
  const map = xOf(run);
  const visible = !view.hidden.has(run.name);
  const mark = (key, name, glyph, color) => {
    const count = run.totals[key];
    return { key, name: `${name} (${whole(count)})`, glyph, color, x: run.marks[key].step.map(map), y: run.marks[key].value.map((y) => y ?? NaN) };
  };
  const marks = [mark("clipped", "clipped", "•", "var(--c4)"), mark("skipped", "skipped", "×", "var(--c1)")];
  return lines(curve("grad_norm", { name: "gradient norm", smooth: true, thin: true }), {
    marks: visible ? marks.filter((each) => each.x.length) : [],
    lines: isNumber(run.totals.max_grad_norm) ? [{ y: run.totals.max_grad_norm, label: "clipped above" }] : [],
  });
}

/** The validation data under gzip -9, in bits per byte. */
function gzip() {
  const books = view.chosen.ledger.validation || {};
  const value = (8 * books.gzip_bytes) / books.bytes;
  return isNumber(value) && value > 0 ? [{ y: value, label: "gzip -9", always: true }] : [];
}

function probeLoss() {
  const series = view.runs.flatMap((run) => {
    if (!run.probe) return [];
    const map = xOf(run);
    const x = run.probe.events.map((event) => map(event.step));
    return [{ key: run.name, name: view.data.runs.length > 1 ? run.name : "mean loss", color: run.color, x, y: run.probe.events.map((event) => mean(event.losses)), points: true }];
  });
  return lines(series);
}

function mean(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : NaN;
}

// ---- the figures ----------------------------------------------------------------------------------------------------

let parameterMetric = "update_ratio";

const SECTIONS = [
  {
    id: "learning",
    title: "Learning",
    figures: [
      {
        id: "loss", title: "Loss", unit: "nats per token", log: "linear",
        words: "A steep fall, then a long slope. Training and validation should fall together; a widening gap is overfitting. A spike that does not recover within a few dozen steps, or a plateau from the start, suggests a wrong learning rate.",
        draw: () => lines([...curve("loss", { name: "training", one: true, smooth: true, thin: true }), ...curve("validation_loss", { name: "validation", one: true, color: "var(--c1)", dashed: true, points: true })]),
      },
      {
        id: "perplexity", title: "Perplexity", unit: "exp(loss)", log: "log",
        words: "How many equally likely tokens the model hesitates between. This is the same curve as the loss, in a unit that is easier to picture. Compare runs only if they use the same tokenizer.",
        draw: () => lines([...curve("loss", { name: "training", one: true, smooth: true, thin: true, change: Math.exp }), ...curve("validation_perplexity", { name: "validation", one: true, color: "var(--c1)", dashed: true, points: true })]),
      },
      {
        id: "bits", title: "Bits per byte", unit: "validation", log: "linear",
        words: "You can compare this between tokenizers, and with any compressor. Below the line of gzip -9, the model predicts the text better than gzip does.",
        draw: () => lines(curve("validation_bits_per_byte", { name: "validation", points: true }), { lines: gzip() }),
      },
      {
        id: "accuracy", title: "Next-token accuracy", unit: "% of validation targets", log: "linear",
        words: "How often the likeliest token is the right one. It improves later than the loss, because probabilities improve before the ranking of the tokens does.",
        draw: () => lines(curve("validation_accuracy", { name: "validation", points: true, change: (y) => 100 * y }), { format: percent }),
      },
      {
        id: "learning_rate", title: "Learning rate", unit: "", log: "linear",
        words: "Warm-up, plateau or slope, and decay, as the schedule says. Compare it with the loss and the gradient norm: what happens at its peak shows whether it is too high.",
        draw: () => lines(curve("learning_rate", { name: "learning rate" })),
      },
      {
        id: "grad_norm", title: "Gradient norm", unit: "of all gradients, before clipping", log: "log",
        words: "It is high and ragged at first, then settles. Gradients at the dots above the line were scaled down to it. If most steps are clipped, the run effectively trains with a smaller learning rate than it says. A slow rise late in a run often comes before a spike in the loss. A cross marks a step that was not finite and was skipped.",
        draw: gradientNorm,
      },
      {
        id: "clipped_share", title: "Clipped steps", unit: "% since the last statistics", log: "never",
        words: "If this stays near 100 % for long, the clipping norm sets the pace, not the learning rate.",
        draw: () => lines(curve("clipped_share", { name: "clipped", points: true, change: (y) => 100 * y }), { zero: true, format: percent }),
      },
      {
        id: "balance_loss", title: "Balance of experts", unit: "without its weight", log: "linear",
        words: "Its lowest value is the number of experts that a token gets: then all experts are used alike. If it climbs towards the number of all experts, the same few get every token: raise model.balance_weight.",
        draw: () => lines(curve("balance_loss", { name: "balance", smooth: true, thin: true })),
      },
      {
        id: "loss_scale", title: "Loss scale", unit: "fp16", log: "log",
        words: "It is halved at each overflow, and doubled after a while without one. If it only falls, the gradients do not fit into fp16.",
        draw: () => lines(curve("loss_scale", { name: "loss scale" })),
      },
    ],
  },
  {
    id: "speed",
    title: "Speed",
    figures: [
      {
        id: "tokens_per_second", title: "Throughput", unit: "tokens per second", log: "linear",
        words: "Flat is healthy. Regular dips come from evaluations, checkpoints or slow reading. If it falls and stays low, the machine is shared with other work, or throttles.",
        draw: () => lines(curve("tokens_per_second", { name: "throughput", smooth: true, thin: true }), { zero: true }),
      },
      {
        id: "mfu", title: "Model FLOPs utilisation", unit: "% of a large matrix product's rate", log: "never",
        words: "How much of this hardware's rate in a large matrix product the run reaches. A low value is normal for a small model. For a large one, it means that the hardware waits: the plot of where the time goes shows for what.",
        draw: () => lines(curve("mfu", { name: "utilisation", smooth: true, thin: true, change: (y) => 100 * y }), { zero: true, format: percent }),
      },
      {
        id: "memory", title: "Peak memory", unit: "GB, of the process that uses most", log: "never",
        words: "This should be level after the first steps. A staircase that keeps rising is a memory leak.",
        draw: () => lines(curve("peak_memory_bytes", { name: "memory", change: (y) => y / 1e9 }), { zero: true, format: (y) => short(y, 4) + " GB" }),
      },
      {
        id: "time", title: "Where the time of a step goes", unit: "ms per step", log: "never", kind: "stack", detail: true,
        words: "Backward takes about twice as long as forward. If you can see the data part, reading is too slow. Communication and waiting are the price of several processes. Much waiting means that their work is unequal.",
        draw: stepTime,
      },
    ],
  },
  {
    id: "inside",
    title: "Inside the model",
    figures: [
      {
        id: "layer_grad_norm", title: "Gradient norm by layer", unit: "by step", log: "log", kind: "heat", detail: true,
        words: "It should be even from bottom to top. Dark lower layers get no gradient (it vanishes). If one layer is bright at one step, a spike began there.",
        draw: () => heat("layers", "grad_norm", "layer"),
      },
      {
        id: "layer_update_ratio", title: "Update ratio by layer", unit: "|update| / |weight|", log: "log", kind: "heat", detail: true,
        words: "How far a step moves each layer, relative to the size of its weights. It follows the learning rate. A layer that is much brighter than its neighbours is being overwritten.",
        draw: () => heat("layers", "update_ratio", "layer"),
      },
      {
        id: "update_ratio", title: "Update ratios", unit: "|update| / |weight|", log: "log", detail: true,
        words: "A rule of thumb is about 1e-3 in mid-training. Far above that, the weights jump around. Far below it, they hardly learn.",
        draw: () => rowsAsLines("layers", "update_ratio", "layer", { lines: [{ y: 1e-3, label: "1e-3", always: true }] }),
      },
      {
        id: "activation_rms", title: "Activation RMS by layer", unit: "of the layer's output", log: "log", kind: "heat", detail: true,
        words: "It grows with depth in a residual stream. If it keeps growing over time, runs in bf16 and fp16 overflow.",
        draw: () => heat("layers", "activation_rms", "layer"),
      },
      {
        id: "activation_outliers", title: "Activation outliers by layer", unit: "max |x| / RMS", log: "log", kind: "heat", detail: true,
        words: "How far the largest activation stands out. Some channels grow huge in trained models, and make low precision hard.",
        draw: () => heat("layers", "activation_outliers", "layer"),
      },
      {
        id: "dead_units", title: "Dead units by layer", unit: "% of the hidden units", log: "linear", kind: "heat", detail: true,
        words: "Units of the feed-forward part that respond to no token. An early rise may reverse. If it jumps up after a spike and stays there, the model has lost capacity.",
        draw: () => shares("dead_units", "layers", "layer"),
      },
      {
        id: "layer_weight_norm", title: "Weight norm by layer", unit: "by step", log: "linear", kind: "heat", detail: true,
        words: "It rises while a model learns. Weight decay slows the rise.",
        draw: () => heat("layers", "weight_norm", "layer"),
      },
      {
        id: "attention_entropy", title: "Attention entropy of every head", unit: "nats; rows: layer.head", log: "linear", kind: "heat", detail: true,
        words: "A high value means that a head looks everywhere. Heads should diverge as they specialise. A head that falls to almost 0 and stays there looks at only one token. If many do so at once, attention has collapsed, a sign that the learning rate is too high.",
        draw: () => heat("heads", "attention_entropy", "head"),
      },
      {
        id: "expert_tokens", title: "Tokens of every expert", unit: "%; rows: layer.expert", log: "linear", kind: "heat", detail: true,
        words: "The share of tokens that each expert computes. A dark row is one that gets next to none. If a layer has a few bright rows and the others are dark, its router has collapsed.",
        draw: () => shares("tokens"),
      },
      {
        id: "expert_probability", title: "Probability of every expert", unit: "%; rows: layer.expert", log: "linear", kind: "heat", detail: true,
        words: "How much the router thinks of each expert, chosen or not. An expert that gets no tokens but keeps some probability can still come back.",
        draw: () => shares("probability"),
      },
      {
        id: "parameters", title: "Every parameter", unit: "", log: "log", kind: "heat", wide: true, detail: true,
        words: "The same for each tensor, for when the plots by layer don't show which one is to blame.",
        draw: () => heat("parameters", parameterMetric, ""),
      },
      {
        id: "logits_entropy", title: "Entropy of the predictions", unit: "nats", log: "linear",
        words: "It starts at the logarithm of the vocabulary size and falls as the model becomes more confident. The entropy of a well-calibrated model is close to its loss. If it is far below the loss, the model is confident and wrong.",
        draw: () => lines(curve("logits_entropy", { name: "entropy", points: true })),
      },
      {
        id: "top_1", title: "Probability of the likeliest token", unit: "% on average", log: "linear",
        words: "Compare it with the accuracy. If they are equal, the model is calibrated. If this is higher, it is overconfident.",
        draw: () => lines(curve("logits_top_1_probability", { name: "top 1", points: true, change: (y) => 100 * y }), { format: percent }),
      },
      {
        id: "logits_z", title: "z of the logits", unit: "mean log-sum-exp", log: "linear",
        words: "Adding a constant to all logits does not change the softmax, so nothing keeps z in place. If it drifts over thousands of steps, it ends in overflow in low precision.",
        draw: () => lines(curve("logits_z", { name: "z", points: true })),
      },
      {
        id: "noise", title: "Gradient noise scale", unit: "tokens", log: "log",
        words: "About the batch size beyond which more tokens per step help little. It grows as the loss falls. If it is far above the line, a larger batch would pay off. If it is far below, the batch is larger than necessary.",
        draw: () => {
          const step = Number(view.chosen.truth["batch.targets_per_full_step"]);
          return lines(curve("gradient_noise_scale", { name: "noise scale", points: true }), { lines: step ? [{ y: step, label: "a step's tokens" }] : [] });
        },
      },
      {
        id: "by_position", title: "Loss by position in the block", unit: "nats per token", log: "linear", own: true,
        words: "It falls to the right if the model uses its context, and is flat if it does not. The first positions have little context and stay hard.",
        draw: () => byBin("by_position", "position in the block (tokens)"),
      },
      {
        id: "by_frequency", title: "Loss by token frequency", unit: "nats per token", log: "linear", own: true,
        words: "Frequent tokens are learned first; rare ones are learned last, and never well. If only the loss of rare tokens stops falling, the run is short of data, not of steps.",
        draw: () => byBin("by_frequency", "tokens by frequency"),
      },
    ],
  },
];

const KINDS = { stack: StackFigure, heat: HeatFigure };

function figure(spec) {
  const made = new (KINDS[spec.kind] || LineFigure)(spec, view);
  if (spec.id === "parameters") {
    const choose = h("select", { class: "tool", "aria-label": "what to show of every parameter", onchange: () => { parameterMetric = choose.value; made.redraw(); } });
    for (const [value, name] of [["update_ratio", "update ratio"], ["grad_norm", "gradient norm"], ["weight_norm", "weight norm"], ["second_moment", "second moment"]]) choose.append(h("option", { value }, name));
    made.tools.prepend(choose);
  }
  view.figures.push(made);
  return made.element;
}

// ---- text: summary, probe, samples, tables --------------------------------------------------------------------------

/** A part of the page that is rebuilt from the data. It keeps its scroll positions. */
function part(element, build) {
  view.parts.push(() => {
    const scrolled = [...element.querySelectorAll(".scroll")].map((each) => [each.scrollTop, each.scrollLeft]);
    const opened = [...element.querySelectorAll("details")].map((each) => each.open);
    const children = build();
    element.hidden = !children.length;
    element.replaceChildren(...children);
    element.querySelectorAll(".scroll").forEach((each, place) => scrolled[place] && ([each.scrollTop, each.scrollLeft] = scrolled[place]));
    element.querySelectorAll("details").forEach((each, place) => opened[place] !== undefined && (each.open = opened[place]));
  });
  return element;
}

const STATES = { running: "running", complete: "complete", stopped: "stopped", failed: "failed" };

function summary() {
  return view.data.runs.map((run, place) => {
    const { totals, status, ledger } = run;
    const last = (key) => (run.curves[key] ? run.curves[key].value.at(-1) : undefined);
    const loss = (key) => (last(key) === null ? "not finite" : short(last(key)));
    const best = run.curves.validation_loss ? Math.min(...run.curves.validation_loss.value.filter(isNumber)) : NaN;
    const books = ledger.validation || {};
    const bytes = (8 * books.gzip_bytes) / books.bytes;
    const done = isNumber(totals.steps) && totals.steps > 0 ? Math.min(1, (totals.step || 0) / totals.steps) : null;
    const rate = totals.seconds / totals.step;
    const left = status && status.state === "running" && isNumber(totals.steps) ? (totals.steps - totals.step) * rate : NaN;
    const figures = [
      ["step", isNumber(totals.steps) ? `${whole(totals.step)} of ${whole(totals.steps)}` : whole(totals.step), isNumber(totals.epoch) ? `epoch ${short(totals.epoch, 3)}` : ""],
      ["training loss", loss("loss"), "nats per token, last step"],
      ["validation loss", loss("validation_loss"), isNumber(best) ? `lowest ${short(best)}` : ""],
      ["perplexity", short(last("validation_perplexity")), "validation"],
      ["bits per byte", short(last("validation_bits_per_byte")), isNumber(bytes) && bytes > 0 ? `gzip -9: ${short(bytes)}` : ""],
      ["accuracy", isNumber(last("validation_accuracy")) ? percent(100 * last("validation_accuracy")) : "–", "next token, validation"],
      ["tokens", prefixed(totals.tokens), isNumber(totals.targets) ? `of ${prefixed(totals.targets)}` : ""],
      ["parameters", prefixed(totals.parameters), String(run.truth["model.class"] ?? "")],
      ["throughput", prefixed(totals.tokens_per_second), "tokens per second, median"],
      ["utilisation", isNumber(totals.mfu) ? percent(100 * totals.mfu) : "–", "MFU, median"],
      ["peak memory", isNumber(totals.peak_memory_bytes) ? short(totals.peak_memory_bytes / 1e9, 3) + " GB" : "–", ""],
      ["time in steps", duration(totals.seconds), isNumber(left) ? `about ${duration(left)} left` : ""],
    ];
    const known = Object.hasOwn(STATES, String(status?.state)) ? status.state : "unknown";
    const state = h("span", { class: `state ${known}` }, String(status?.state ?? "no status.json"));
    const swatch = h("i", { class: "swatch" });
    swatch.style.background = `var(--c${place % 8})`;
    const bar = h("div", { class: "progress" }, h("i"));
    if (done !== null) bar.firstChild.style.width = `${100 * done}%`;
    const remarks = [status?.reason, totals.skipped ? `skipped because not finite: ${totals.skipped === 1 ? "1 step" : whole(totals.skipped) + " steps"}` : "", ...run.notes].filter(Boolean);
    return h(
      "article",
      { class: "card run" },
      h("div", { class: "head" }, view.data.runs.length > 1 ? swatch : null, h("h2", {}, run.name), state),
      done === null ? null : bar,
      h("dl", { class: "figures" }, ...figures.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "more" }, more)))),
      ...remarks.map((text) => h("p", { class: "remark" }, String(text))),
    );
  });
}

/** The probe's text at the slider's step, with each token coloured by its loss. */
function probe(place) {
  const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "step of the probe", oninput: () => { follow = Number(slider.value) === Number(slider.max); show(); } });
  const label = h("output", {});
  const text = h("div", { class: "tokens", tabindex: 0 });
  const key = h("div", { class: "legend" }, h("span", { class: "scale" }, "0 nats", h("i", { class: "bar loss" }), "8 or more"));
  let follow = true;

  function show() {
    const { events, strings } = view.chosen.probe;
    const event = events[Number(slider.value)];
    const average = mean(event.losses);
    label.textContent = `step ${whole(event.step)} · mean loss ${short(average)} · perplexity ${short(Math.exp(average))}`;
    const spans = event.tokens.map((token, at) => {
      const loss = event.losses[at];
      const span = h("span", {}, strings[token].replaceAll("\n", "⏎\n"));
      span.dataset.place = at;
      if (isNumber(loss)) span.style.setProperty("--loss", `${Math.round(100 * Math.min(1, loss / 8))}%`);
      else span.className = "first";
      return span;
    });
    text.replaceChildren(...spans);
  }

  const visible = (string) => `“${string.replaceAll("\n", "⏎")}”`;
  function tell(event) {
    const span = event.target.closest("span");
    if (!span || !text.contains(span)) return tooltip.hide();
    const { events, strings } = view.chosen.probe;
    const { tokens, losses, top } = events[Number(slider.value)];
    const at = Number(span.dataset.place);
    const loss = losses[at];
    if (!isNumber(loss)) return tooltip.show(event, visible(strings[tokens[at]]), [["first token: nothing predicts it", "", null]]);
    const rows = (top[at] || []).map(([string, share]) => [visible(strings[string]), percent(100 * share), string === tokens[at] ? "var(--c2)" : null]);
    tooltip.show(event, visible(strings[tokens[at]]), [["loss", short(loss, 3) + " nats", null], ["its probability", percent(100 * Math.exp(-loss)), null], ...rows]);
  }
  text.addEventListener("pointermove", tell);
  text.addEventListener("pointerdown", tell);
  text.addEventListener("pointerleave", () => tooltip.hide());

  const chart = figure({
    id: "probe_loss", title: "Loss of the probe", unit: "nats per token", log: "linear",
    words: "The mean over the text above. It is always the same short text, so any noise comes from the weights, not from the data.",
    draw: probeLoss,
  });
  place.append(
    h("div", { class: "card" },
      h("div", { class: "slider" }, slider, label),
      text, key,
      h("p", { class: "words" }, "Each token of one fixed text: the warmer its colour, the more it surprised the model. Drag the slider: layout and punctuation cool down first, then repeated words, and names last. Hover over a token to see what the model expected instead.")),
    chart,
  );
  view.parts.push(() => {
    const found = view.chosen.probe;
    place.firstElementChild.hidden = !found;
    if (!found) return;
    slider.max = found.events.length - 1;
    if (follow || Number(slider.value) > Number(slider.max)) slider.value = slider.max;
    show();
  });
}

function samples() {
  const found = view.chosen.samples;
  if (!found.length) return [];
  const rows = found.toReversed().map((sample) => h("li", {}, h("b", {}, `step ${whole(sample.step)}`), h("pre", {}, h("span", { class: "prompt" }, sample.prompt), sample.continuation)));
  return [h("div", { class: "card" }, h("ol", { class: "scroll samples" }, ...rows), h("p", { class: "words" }, "Newest first; the prompt is muted. Repetition is typical of an early model or of a low temperature. Look for the first text that keeps its thread."))];
}

/** One table with a column for each run. Keys whose values differ come first and stand out. */
function compared(pick, words) {
  const runs = view.data.runs;
  const keys = [...new Set(runs.flatMap((run) => Object.keys(pick(run))))];
  if (!keys.length) return [];
  const values = (key) => runs.map((run) => { const value = pick(run)[key]; return value === undefined ? "–" : value === null ? "null" : typeof value === "number" && Number.isInteger(value) ? whole(value) : String(value); });
  const differs = (key) => new Set(values(key)).size > 1;
  const ordered = runs.length > 1 ? [...keys.filter(differs), ...keys.filter((key) => !differs(key))] : keys;
  const head = runs.length > 1 ? [h("thead", {}, h("tr", {}, h("th", {}), ...runs.map((run) => h("th", {}, run.name))))] : [];
  const body = h("tbody", {}, ...ordered.map((key) => h("tr", { class: runs.length > 1 && differs(key) ? "differs" : "" }, h("th", {}, key), ...values(key).map((value) => h("td", {}, value)))));
  return [h("div", { class: "scroll" }, h("table", {}, ...head, body)), h("p", { class: "words" }, words)];
}

function ledger() {
  const pick = (run) => Object.fromEntries(Object.entries(run.ledger).flatMap(([side, books]) => Object.entries(books).map(([key, value]) => [`${side}: ${key.replaceAll("_", " ")}`, value])));
  const table = compared(pick, "The ledger of the data: text tokens and end-of-text tokens add up to trained targets, first tokens and dropped tokens. You can only compare runs if validation: sha256 is the same.");
  return table.length ? [h("details", { class: "card", open: true }, h("summary", {}, "Ledger"), ...table)] : [];
}

function sheets() {
  const truth = compared((run) => run.truth, "What was measured before the first step, not what was asked for.");
  const config = compared((run) => run.config, "All settings, including defaults.");
  return [
    ...(truth.length ? [h("details", { class: "card" }, h("summary", {}, "Truth sheet"), ...truth)] : []),
    ...(config.length ? [h("details", { class: "card" }, h("summary", {}, "Configuration"), ...config)] : []),
  ];
}

function decay() {
  const groups = view.chosen.groups;
  if (!groups.length) return [];
  const rows = groups.map((group) =>
    h("tr", {}, h("td", { class: "number" }, short(Number(group.weight_decay))), h("td", { class: "number" }, whole(group.numbers)), h("td", { class: "number" }, whole(group.names.length)), h("td", { class: "names" }, group.names.join(", "))));
  return [
    h("details", { class: "card" }, h("summary", {}, "Decay groups"),
      h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ...["weight decay", "numbers", "tensors", "names"].map((name) => h("th", {}, name)))), h("tbody", {}, ...rows))),
      h("p", { class: "words" }, "Matrices decay. Norms and biases, of which there are few, do not.")),
  ];
}

// ---- putting it together --------------------------------------------------------------------------------------------

/** A row of buttons, of which one is pressed. */
function choice(name, options, current, choose) {
  const buttons = options.map(([value, label]) => h("button", { type: "button", "aria-pressed": value === current, onclick: () => {
    for (const each of buttons) each.setAttribute("aria-pressed", each === buttons[options.findIndex(([other]) => other === value)]);
    choose(value);
  } }, label));
  return h("div", { class: "choice", role: "group", "aria-label": name }, h("span", {}, name), ...buttons);
}

function themeButton() {
  const order = ["auto", "light", "dark"];
  const button = h("button", { id: "theme", class: "tool", type: "button", onclick: () => set(order[(order.indexOf(button.dataset.value) + 1) % 3]) });
  const set = (value) => {
    button.dataset.value = value;
    button.textContent = `theme: ${value}`;
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  };
  set("auto");
  return button;
}

function build() {
  const several = view.data.runs.length > 1;
  const nav = h("nav", { "aria-label": "sections" });
  const toolbar = h("div", { id: "toolbar" },
    choice("x axis", [["step", "steps"], ["tokens", "tokens"], ["seconds", "time"]], view.kind, (value) => { view.kind = value; view.zoom(null); }),
    choice("smoothing", [[0, "off"], [0.01, "1 %"], [0.05, "5 %"]], view.smooth, (value) => { view.smooth = value; view.redraw(); }),
    h("button", { id: "unzoom", class: "tool", type: "button", hidden: true, onclick: () => view.zoom(null) }, "reset zoom"));
  if (several) {
    const chips = view.data.runs.map((run, place) => {
      const swatch = h("i");
      swatch.style.background = `var(--c${place % 8})`;
      const chip = h("button", { type: "button", "aria-pressed": true, onclick: () => {
        if (!view.hidden.delete(run.name)) view.hidden.add(run.name);
        chip.setAttribute("aria-pressed", !view.hidden.has(run.name));
        view.redraw();
      } }, swatch, run.name);
      return chip;
    });
    const choose = h("select", { id: "detail", class: "tool", "aria-label": "run whose details are shown", onchange: () => { view.run = choose.selectedIndex; view.renew(); } },
      ...view.data.runs.map((run) => h("option", {}, run.name)));
    toolbar.append(h("div", { class: "legend runs" }, ...chips), h("label", { class: "choice" }, h("span", {}, "details of"), choose));
  }
  const main = h("main", {});
  const section = (id, title, ...children) => {
    const made = h("section", { id }, h("h2", { class: "title" }, title), ...children);
    nav.append(h("a", { href: `#${id}` }, title));
    main.append(made);
    return made;
  };
  nav.append(h("a", { href: "#summary" }, "Summary"));
  main.append(h("section", { id: "summary" }, part(h("div", { class: several ? "cards" : "" }), summary)));
  for (const { id, title, figures } of SECTIONS) section(id, title, h("div", { class: "cards" }, ...figures.map(figure)));
  const place = h("div", { class: "probe" });
  section("probe", "Probe", place);
  probe(place);
  const textSection = (id, title, ...parts) => {
    const made = section(id, title, ...parts);
    view.parts.push(() => {
      made.hidden = parts.every((each) => each.hidden);
      nav.querySelector(`a[href="#${id}"]`).hidden = made.hidden;
    });
  };
  textSection("samples", "Samples", part(h("div"), samples));
  textSection("data-books", "Data", part(h("div"), ledger));
  textSection("sheets", "Settings", part(h("div"), decay), part(h("div"), sheets));
  const live = h("span", { id: "live", hidden: true });
  document.getElementById("page").replaceChildren(
    h("header", {}, h("div", { class: "top" }, h("h1", {}, "train_loop", h("small", {}, several ? `${view.data.runs.length} runs` : view.data.runs[0].folder)), live, themeButton()), h("div", { class: "bars" }, nav, toolbar)),
    main,
    h("footer", {}, `Made by train_loop ${view.data.version}. Drag in a plot to zoom all of them, double-click to zoom out; arrow keys move the crosshair. Long curves keep the lowest and the highest point of each stretch.`),
  );
  const titled = view.data.runs.map((run) => run.name).join(", ");
  document.title = `${titled} · train_loop`;
}

// ---- a served page asks for newer data as long as a run goes on -----------------------------------------------------

const SECONDS_BETWEEN_QUESTIONS = 2;

function goesOn() {
  return view.data.runs.some((run) => run.status === null || run.status.state === "running");
}

function live() {
  const sign = document.getElementById("live");
  let tag = null;
  const show = (state, text) => {
    sign.hidden = false;
    sign.className = state;
    sign.textContent = text;
  };
  const ask = async () => {
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        view.data = await answer.json();
        view.renew();
      }
      show("on", "live");
    } catch {
      show("lost", "server gone");
    }
    if (goesOn()) setTimeout(ask, 1000 * SECONDS_BETWEEN_QUESTIONS);
    else show("off", "run ended");
  };
  if (goesOn()) {
    show("on", "live");
    setTimeout(ask, 1000 * SECONDS_BETWEEN_QUESTIONS);
  } else show("off", "run ended");
}

function start() {
  view.data = JSON.parse(document.getElementById("data").textContent);
  build();
  view.renew();
  let waiting = false;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (waiting || width === innerWidth) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      width = innerWidth;
      view.redraw();
    });
  });
  addEventListener("scroll", () => tooltip.hide(), { passive: true });
  if (view.data.live) live();
}
