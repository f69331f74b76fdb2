"use strict";
// Small charts: lines, stacked areas and heat maps, drawn into SVG or a canvas, with a crosshair and zoom.
//
// A function tells a chart what to draw, so the same chart can draw newer data, another x axis or other colours.
// Charts over steps share one zoom: zooming one plot zooms all of them.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; attributes that begin with "on" are listeners, children are elements or text (never markup). */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

// ---- numbers as text ------------------------------------------------------------------------------------------------

const LARGEST = 1e150; // what is larger can't be drawn: sums and ratios would overflow
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with about `digits` significant digits: 12,345 · 3.142 · 2.5e-5. */
function short(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

/** A count with a prefix: 1.5M. */
function prefixed(value, digits = 3) {
  if (!isNumber(value)) return "–";
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size * 0.9995) return Number((value / size).toPrecision(digits)) + letter;
  }
  return String(Number(value.toPrecision(digits)));
}

const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en-US") : "–");

/** Seconds in words: 42 s · 3 min 20 s · 2 h 05 min. */
function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return Number(seconds.toPrecision(3)) + " s";
  if (seconds < 3600) return Math.floor(seconds / 60) + " min " + Math.round(seconds % 60) + " s";
  if (seconds < 86400) return Math.floor(seconds / 3600) + " h " + Math.floor((seconds % 3600) / 60) + " min";
  return Math.floor(seconds / 86400) + " d " + Math.floor((seconds % 86400) / 3600) + " h";
}

// ---- scales and ticks -----------------------------------------------------------------------------------------------

/** Round numbers between low and high, about `count` of them. */
function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((each) => power * each >= raw * 0.999);
  const ticks = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) {
    ticks.push(Number((place * step).toPrecision(12)));
  }
  return ticks;
}

/** Powers of ten between low and high, also times 2 and 5 if there are few; round numbers if there is less than one. */
function logTicks(low, high, count) {
  const decades = Math.log10(high) - Math.log10(low);
  if (decades < 0.7) return linearTicks(low, high, count);
  const stride = Math.max(1, Math.ceil(decades / count));
  const leading = decades < count / 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (power % stride) continue;
    for (const each of leading) ticks.push(Number((each * 10 ** power).toPrecision(3)));
  }
  const inside = ticks.filter((tick) => tick >= low * 0.9999 && tick <= high * 1.0001);
  return inside.length ? inside : [low, high];
}

/** Labels for ticks, with as many digits as are needed to tell them apart. */
function tickLabel(ticks, format) {
  if (format) return format;
  const largest = Math.max(...ticks.map(Math.abs));
  const gap = Math.min(...ticks.slice(1).map((tick, place) => Math.abs(tick - ticks[place])));
  if (largest >= 1e4) return (value) => prefixed(value, Math.min(6, Math.max(2, Math.ceil(Math.log10(largest / gap)) + 1)));
  if (largest < 1e-3) return (value) => short(value, 3);
  return (value) => (value !== 0 && Math.abs(value) < 1e-3 ? short(value, 3) : String(Number(value.toPrecision(6))));
}

function scale(low, high, from, to, logarithmic) {
  const change = logarithmic ? Math.log : (value) => value;
  const [a, b] = [change(low), change(high)];
  return (value) => from + ((change(value) - a) / (b - a || 1)) * (to - from);
}

/** A function from steps to x values: steps, tokens or seconds, read from a run's own axis. */
function along(axis, kind) {
  if (kind === "step") return (step) => step;
  const [steps, values] = [axis.step, axis[kind]];
  return (step) => {
    let [low, high] = [0, steps.length - 1];
    if (high < 0) return NaN;
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const share = (step - steps[low]) / (steps[high] - steps[low] || 1);
    return values[low] + share * (values[high] - values[low]);
  };
}

/** Exponential average with a time constant in units of x, corrected at the beginning. Gaps stay gaps. */
function smoothed(x, y, constant) {
  let [average, weight, before] = [0, 0, null];
  return y.map((value, place) => {
    if (!isNumber(value)) return value;
    const keep = before === null ? 0 : Math.exp(-Math.max(0, x[place] - before) / constant);
    before = x[place];
    average = average * keep + value * (1 - keep);
    weight = weight * keep + (1 - keep);
    return average / weight;
  });
}

/** The index whose x is nearest. */
function nearest(x, value) {
  let best = -1;
  for (let place = 0; place < x.length; place++) {
    if (isNumber(x[place]) && (best < 0 || Math.abs(x[place] - value) < Math.abs(x[best] - value))) best = place;
  }
  return best;
}

// ---- colours --------------------------------------------------------------------------------------------------------

// Cividis (Nuñez, Anderton and Renslow, 2018) at nine places: it looks even with and without colour vision.
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838"].map(
  (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)),
);

function sequential(share) {
  const place = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  const part = place - low;
  const mixed = CIVIDIS[low].map((value, channel) => Math.round(value + part * (CIVIDIS[low + 1][channel] - value)));
  return "rgb(" + mixed.join(",") + ")";
}

/** Colours for a family of lines (layers, steps), from the palette's cool end to its warm end. */
const family = (place, count) =>
  `color-mix(in oklab, var(--c1) ${Math.round((100 * place) / Math.max(1, count - 1))}%, var(--c0))`;

// ---- the tooltip, shared by all -------------------------------------------------------------------------------------

const tooltip = {
  element: null,
  show(event, title, rows) {
    this.element ??= document.body.appendChild(h("div", { id: "tooltip", role: "status" }));
    const body = rows.map(([name, value, color]) => {
      const swatch = h("i");
      if (color) swatch.style.background = color;
      return h("div", { class: "row" }, color ? swatch : null, h("span", {}, name), h("b", {}, value));
    });
    this.element.replaceChildren(h("strong", {}, title), ...body);
    this.element.style.display = "block";
    const [width, height] = [this.element.offsetWidth, this.element.offsetHeight];
    const left = event.clientX + 16 + width > innerWidth - 8 ? event.clientX - width - 16 : event.clientX + 16;
    this.element.style.left = Math.max(8, Math.min(left, innerWidth - width - 8)) + "px";
    this.element.style.top = Math.max(8, Math.min(event.clientY + 16, innerHeight - height - 8)) + "px";
  },
  hide() {
    if (this.element) this.element.style.display = "none";
  },
};

// ---- a figure: title, tools, plot, legend, words --------------------------------------------------------------------

class Figure {
  /**
   * spec: id, title, unit (of y), words (what to look for), draw (a function that returns what to draw),
   * log ("never", or "linear" or "log" at first), own (it has its own x axis instead of steps).
   */
  constructor(spec, view) {
    Object.assign(this, { spec, view, log: spec.log === "log", hidden: new Set(), range: null });
    this.tools = h("div", { class: "tools" });
    if (spec.log && spec.log !== "never") {
      this.logButton = h("button", { class: "tool", type: "button", onclick: () => this.setLog(!this.log) }, "log");
      this.logButton.setAttribute("aria-label", "logarithmic y axis");
      this.tools.append(this.logButton);
    }
    this.plot = h("div", { class: "plot" });
    this.legend = h("div", { class: "legend" });
    this.element = h(
      "figure",
      { id: spec.id, class: spec.wide ? "wide" : "" },
      h("div", { class: "head" }, h("h3", {}, spec.title), h("span", { class: "unit" }, spec.unit || ""), this.tools),
      this.plot,
      this.legend,
      h("figcaption", {}, spec.words),
    );
    this.setLog(this.log, false);
  }

  setLog(on, draw = true) {
    this.log = on;
    if (this.logButton) this.logButton.setAttribute("aria-pressed", on);
    if (draw) this.redraw();
  }

  get window() {
    return this.spec.own ? this.range : this.view.range;
  }

  zoom(range) {
    if (this.spec.own) {
      this.range = range;
      this.redraw();
    } else this.view.zoom(range);
  }

  /** Draw the figure, or hide it if there is nothing to draw. */
  redraw() {
    const drawing = this.spec.draw(this);
    this.element.hidden = !drawing;
    if (drawing) this.paint(drawing);
    return !!drawing;
  }

  legendOf(entries) {
    this.legend.replaceChildren(
      ...entries.map(({ key, name, color, dashed, glyph }) => {
        const swatch = h("i", { class: dashed ? "dashed" : glyph ? "glyph" : "" }, glyph || "");
        if (glyph) swatch.style.color = color;
        else swatch.style.background = dashed ? `repeating-linear-gradient(90deg, ${color} 0 5px, transparent 5px 8px)` : color;
        const button = h("button", { type: "button", "aria-pressed": !this.hidden.has(key) }, swatch, name);
        button.addEventListener("click", () => {
          if (!this.hidden.delete(key)) this.hidden.add(key);
          this.redraw();
          const again = [...this.legend.children].find((each) => each.dataset.key === key);
          if (again) again.focus();
        });
        button.dataset.key = key;
        return button;
      }),
    );
  }

  /** An empty plot with axes; returns the surface to draw on and its scales. */
  surface(xLow, xHigh, yLow, yHigh, { xTicks, xLabel, xFormat, yFormat, height = 240, left = 52 }) {
    const width = Math.max(220, this.plot.clientWidth || 560);
    const box = { left, right: width - 12, top: 10, bottom: height - 34 };
    const x = scale(xLow, xHigh, box.left, box.right, false);
    const y = scale(yLow, yHigh, box.bottom, box.top, this.log);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": this.spec.title });
    root.tabIndex = 0;
    const grid = svg("g", { class: "grid" });
    const yTicks = (this.log ? logTicks : linearTicks)(yLow, yHigh, 5);
    const yText = tickLabel(yTicks, yFormat);
    for (const tick of yTicks) {
      const at = y(tick).toFixed(1);
      grid.append(svg("line", { x1: box.left, x2: box.right, y1: at, y2: at }));
      grid.append(svg("text", { x: box.left - 8, y: at, dy: "0.32em", "text-anchor": "end" }, yText(tick)));
    }
    const ticks = xTicks || linearTicks(xLow, xHigh, Math.max(2, Math.floor(width / 110)));
    const xText = tickLabel(ticks, xFormat);
    let free = -Infinity; // where the previous label ends
    for (const tick of ticks) {
      const at = x(tick);
      const anchor = at > box.right - 14 ? "end" : "middle";
      const wide = 6.8 * String(xText(tick)).length;
      const begin = anchor === "end" ? at - wide : at - wide / 2;
      if (begin < free + 6) continue;
      free = begin + wide;
      grid.append(svg("line", { class: "tick", x1: at.toFixed(1), x2: at.toFixed(1), y1: box.bottom, y2: box.bottom + 4 }));
      grid.append(svg("text", { x: at.toFixed(1), y: box.bottom + 16, "text-anchor": anchor }, xText(tick)));
    }
    grid.append(svg("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    grid.append(svg("text", { class: "label", x: box.right, y: height - 3, "text-anchor": "end" }, xLabel));
    const clip = `clip-${this.spec.id}`;
    const path = svg("clipPath", { id: clip });
    path.append(svg("rect", { x: box.left - 4, y: box.top - 4, width: box.right - box.left + 8, height: box.bottom - box.top + 8 }));
    const content = svg("g", { "clip-path": `url(#${clip})` });
    const over = svg("g", { class: "over" });
    root.append(path, grid, content, over);
    return { root, content, over, x, y, box, xOf: (pixel) => xLow + ((pixel - box.left) / (box.right - box.left)) * (xHigh - xLow) };
  }

  /** Crosshair and tooltip; dragging zooms, a double click zooms out; arrow keys move the crosshair, Escape zooms out. */
  listen({ root, over, x, box, xOf }, stops, describe) {
    let from = null;
    let at = null;
    const pixel = (event) => Math.min(box.right, Math.max(box.left, event.clientX - root.getBoundingClientRect().left));
    const look = (value, event) => {
      const place = nearest(stops, value);
      if (place < 0) return;
      at = place;
      const { title, rows, dots } = describe(stops[place]);
      const line = x(stops[place]).toFixed(1);
      over.replaceChildren(svg("line", { class: "cross", x1: line, x2: line, y1: box.top, y2: box.bottom }));
      for (const [cx, cy, color] of dots || []) {
        const dot = svg("circle", { cx, cy, r: 3.5, class: "dot" });
        dot.style.fill = color;
        over.append(dot);
      }
      tooltip.show(event, title, rows);
    };
    root.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) {
        from = pixel(event);
        root.setPointerCapture(event.pointerId);
      } else if (event.pointerType !== "mouse") look(xOf(pixel(event)), event);
    });
    root.addEventListener("pointermove", (event) => {
      const here = pixel(event);
      if (from !== null && Math.abs(here - from) > 4) {
        tooltip.hide();
        over.replaceChildren(
          svg("rect", { class: "brush", x: Math.min(from, here), y: box.top, width: Math.abs(here - from), height: box.bottom - box.top }),
        );
      } else look(xOf(here), event);
    });
    root.addEventListener("pointerup", (event) => {
      const [begin, end] = [from, pixel(event)];
      from = null;
      if (begin !== null && Math.abs(end - begin) > 4) this.zoom([xOf(Math.min(begin, end)), xOf(Math.max(begin, end))]);
    });
    const leave = () => {
      from = null;
      over.replaceChildren();
      tooltip.hide();
    };
    root.addEventListener("pointercancel", leave);
    root.addEventListener("pointerleave", () => from === null && leave());
    root.addEventListener("blur", leave);
    root.addEventListener("dblclick", () => this.zoom(null));
    root.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") this.zoom(null);
      if (!move || !stops.length) return;
      event.preventDefault();
      at = Math.min(stops.length - 1, Math.max(0, (at ?? (move > 0 ? -1 : stops.length)) + move));
      const frame = root.getBoundingClientRect();
      look(stops[at], { clientX: frame.left + x(stops[at]), clientY: frame.top + 40 });
    });
  }
}

/**
 * Lines. draw() returns {series: [{key, name, color, dashed, x, y, faint: {x, y}, points, value}], marks: [{key, name,
 * color, glyph, x, y}], lines: [{y, label}], xLabel, xFormat, xTicks, format, zero, ceiling} or null.
 */
class LineFigure extends Figure {
  paint(drawing) {
    const { series, marks = [], lines = [] } = drawing;
    this.legendOf(series.length + marks.length > 1 || drawing.alwaysLegend ? [...series, ...marks] : []);
    const shown = series.filter((each) => !this.hidden.has(each.key));
    const shownMarks = marks.filter((each) => !this.hidden.has(each.key));
    const good = (value) => isNumber(value) && Math.abs(value) < LARGEST && (!this.log || value > 1 / LARGEST);
    let [xLow, xHigh] = this.window || drawing.domain || [Infinity, -Infinity];
    if (!this.window && !drawing.domain) {
      for (const each of series) for (const value of each.x) if (isNumber(value)) [xLow, xHigh] = [Math.min(xLow, value), Math.max(xHigh, value)];
    }
    if (!(xHigh > xLow)) [xLow, xHigh] = isNumber(xLow) ? [xLow - 1, xLow + 1] : [0, 1];
    let [yLow, yHigh] = [Infinity, -Infinity];
    const stretch = (x, y) => {
      for (let place = 0; place < x.length; place++) {
        if (x[place] >= xLow && x[place] <= xHigh && good(y[place])) [yLow, yHigh] = [Math.min(yLow, y[place]), Math.max(yHigh, y[place])];
      }
    };
    for (const each of shown) {
      stretch(each.x, each.y);
      if (each.faint) stretch(each.faint.x, each.faint.y);
    }
    for (const each of shownMarks) stretch(each.x, each.y);
    for (const { y, always } of lines) if (good(y) && (always || (y > yLow / 3 && y < yHigh * 3))) [yLow, yHigh] = [Math.min(yLow, y), Math.max(yHigh, y)];
    if (!(yHigh >= yLow)) [yLow, yHigh] = this.log ? [1, 10] : [0, 1];
    if (this.log) {
      const pad = Math.max(1.02, (yHigh / yLow) ** 0.05);
      [yLow, yHigh] = [yLow / pad, yHigh * pad];
    } else {
      if (drawing.zero && yLow > 0) yLow = 0;
      const pad = (yHigh - yLow || Math.abs(yHigh) || 1) * 0.05;
      [yLow, yHigh] = [yLow === 0 && drawing.zero ? 0 : yLow - pad, yHigh + pad];
    }
    const surface = this.surface(xLow, xHigh, yLow, yHigh, drawing);
    const { root, content, x, y } = surface;
    for (const { y: value, label } of lines) {
      if (!(value >= yLow && value <= yHigh)) continue;
      const at = y(value).toFixed(1);
      content.append(svg("line", { class: "reference", x1: surface.box.left, x2: surface.box.right, y1: at, y2: at }));
      content.append(svg("text", { class: "reference", x: surface.box.right - 4, y: at - 5, "text-anchor": "end" }, label));
    }
    const pathOf = (xs, ys) => {
      let [path, broken] = ["", true];
      for (let place = 0; place < xs.length; place++) {
        if (!good(ys[place]) || !isNumber(xs[place])) broken = true;
        else if ((xs[place + 1] ?? Infinity) >= xLow && (xs[place - 1] ?? -Infinity) <= xHigh) {
          path += (broken ? "M" : "L") + x(xs[place]).toFixed(1) + " " + y(ys[place]).toFixed(1);
          broken = false;
        }
      }
      return path;
    };
    const line = (xs, ys, each, kind) => {
      const path = svg("path", { d: pathOf(xs, ys), class: "line " + kind + (each.dashed ? " dashed" : "") });
      path.style.stroke = each.color;
      path.dataset.key = each.key;
      content.append(path);
    };
    for (const each of shown) if (each.faint) line(each.faint.x, each.faint.y, each, "faint");
    for (const each of shown) {
      line(each.x, each.y, each, each.thin ? "thin" : "");
      if (!each.points || each.x.length > 150) continue;
      for (let place = 0; place < each.x.length; place++) {
        if (!good(each.y[place]) || !(each.x[place] >= xLow && each.x[place] <= xHigh)) continue;
        const dot = svg("circle", { cx: x(each.x[place]).toFixed(1), cy: y(each.y[place]).toFixed(1), r: 2.6, class: "point" });
        dot.style.fill = each.color;
        content.append(dot);
      }
    }
    for (const mark of shownMarks) {
      const group = svg("g", { class: "marks" });
      group.dataset.key = mark.key;
      for (let place = 0; place < mark.x.length; place++) {
        if (!(mark.x[place] >= xLow && mark.x[place] <= xHigh)) continue;
        const value = good(mark.y[place]) ? mark.y[place] : yLow;
        const [cx, cy] = [x(mark.x[place]), y(value)];
        const glyph =
          mark.glyph === "×"
            ? svg("path", { d: `M${cx - 4} ${cy - 4}l8 8m0 -8l-8 8`, class: "glyph" })
            : svg("circle", { cx: cx.toFixed(1), cy: cy.toFixed(1), r: 1.8 });
        glyph.style[mark.glyph === "×" ? "stroke" : "fill"] = mark.color;
        group.append(glyph);
      }
      content.append(group);
    }
    this.plot.replaceChildren(root);
    const stops = [...new Set(shown.flatMap((each) => each.x.filter((value, place) => value >= xLow && value <= xHigh && good(each.y[place]))))].sort((a, b) => a - b);
    const format = drawing.format || short;
    this.listen(surface, stops, (value) => {
      const [rows, dots] = [[], []];
      for (const each of shown) {
        const place = nearest(each.x, value);
        if (place < 0) continue;
        // Far from the crosshair there is no value to show: an evaluation belongs to its own step only.
        const far = Math.abs(x(each.x[place]) - x(value)) > 24;
        const raw = each.faint ? each.faint.y[nearest(each.faint.x, value)] : null;
        const text = far ? "–" : format(each.y[place]) + (raw === null ? "" : `  (raw ${format(raw)})`);
        rows.push([each.name, text, each.color]);
        if (!far && good(each.y[place])) dots.push([x(each.x[place]), y(each.y[place]), each.color]);
      }
      return { title: drawing.xTitle(value), rows: rows.slice(0, 24), dots };
    });
  }
}

/** Stacked areas. draw() returns {x, layers: [{key, name, color, y}], xLabel, xTitle, format} or null. */
class StackFigure extends Figure {
  paint(drawing) {
    const { x: xs, layers } = drawing;
    this.legendOf(layers);
    const shown = layers.filter((each) => !this.hidden.has(each.key));
    const sums = [xs.map(() => 0)];
    for (const each of shown) sums.push(sums.at(-1).map((sum, place) => sum + (each.y[place] || 0)));
    let [xLow, xHigh] = this.window || drawing.domain;
    if (!(xHigh > xLow)) xHigh = xLow + 1;
    const inside = sums.at(-1).filter((value, place) => xs[place] >= xLow && xs[place] <= xHigh);
    const yHigh = (Math.max(0, ...inside) || 1) * 1.05;
    const surface = this.surface(xLow, xHigh, 0, yHigh, drawing);
    shown.forEach((each, place) => {
      const top = xs.map((value, at) => surface.x(value).toFixed(1) + " " + surface.y(sums[place + 1][at]).toFixed(1));
      const bottom = xs.map((value, at) => surface.x(value).toFixed(1) + " " + surface.y(sums[place][at]).toFixed(1)).reverse();
      const area = svg("path", { d: "M" + [...top, ...bottom].join("L") + "Z", class: "area" });
      area.style.fill = each.color;
      area.dataset.key = each.key;
      surface.content.append(area);
    });
    this.plot.replaceChildren(surface.root);
    this.listen(surface, xs.filter((value) => value >= xLow && value <= xHigh), (value) => {
      const at = nearest(xs, value);
      const total = sums.at(-1)[at];
      const rows = shown.map((each) => [each.name, `${drawing.format(each.y[at])}  ${Math.round((100 * each.y[at]) / (total || 1))} %`, each.color]);
      return { title: drawing.xTitle(value), rows: [...rows.reverse(), ["all", drawing.format(total), null]] };
    });
  }
}

/** Rows over time. draw() returns {rows, x, values [row][time], rowLabel, xLabel, xTitle, format} or null. */
class HeatFigure extends Figure {
  paint(drawing) {
    const { rows, x: xs, values } = drawing;
    const good = (value) => isNumber(value) && Math.abs(value) < LARGEST && (!this.log || value > 1 / LARGEST);
    let [low, high] = [Infinity, -Infinity];
    for (const row of values) for (const value of row) if (good(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    if (!(high >= low)) [low, high] = [0, 1];
    const longest = Math.max(...rows.map((name) => name.length));
    const left = Math.min(Math.max(40, 14 + longest * 6.2), Math.max(90, (this.plot.clientWidth || 560) * 0.34));
    const height = Math.max(110, Math.min(46 + rows.length * (rows.length > 40 ? 9 : 20), 520));
    const width = Math.max(220, this.plot.clientWidth || 560);
    let [xLow, xHigh] = this.window || drawing.domain;
    if (!(xHigh > xLow)) xHigh = xLow + 1;
    const box = { left, right: width - 12, top: 6, bottom: height - 34 };
    const x = scale(xLow, xHigh, box.left, box.right, false);
    const tall = (box.bottom - box.top) / rows.length;
    const color = (value) => sequential((this.log ? Math.log(value / low) / Math.log(high / low || 2) : (value - low) / (high - low || 1)) || 0);

    // The cells as a picture: a cell reaches from the previous time to its own.
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const canvas = h("canvas", { width: Math.round((box.right - box.left) * ratio), height: Math.round((box.bottom - box.top) * ratio) });
    Object.assign(canvas.style, { left: box.left + "px", top: box.top + "px", width: box.right - box.left + "px", height: box.bottom - box.top + "px" });
    const paper = canvas.getContext("2d");
    paper.scale(ratio, ratio);
    let cells = 0;
    values.forEach((row, down) =>
      row.forEach((value, place) => {
        const [from, to] = [x(place ? xs[place - 1] : drawing.domain[0]) - box.left, x(xs[place]) - box.left];
        if (!good(value)) return;
        cells++;
        paper.fillStyle = color(value);
        const top = Math.round(down * tall);
        paper.fillRect(from, top, Math.max(1, to - from) + 0.6, Math.round((down + 1) * tall) - top);
      }),
    );
    Object.assign(canvas.dataset, { rows: rows.length, columns: xs.length, cells });

    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": this.spec.title });
    root.tabIndex = 0;
    const grid = svg("g", { class: "grid" });
    const every = Math.ceil(rows.length / Math.max(1, Math.floor((box.bottom - box.top) / 13)));
    rows.forEach((name, down) => {
      if (down % every) return;
      const most = Math.floor((left - 12) / 6.2);
      const text = name.length > most ? "…" + name.slice(name.length - most + 1) : name;
      grid.append(svg("text", { x: left - 8, y: box.top + (down + 0.5) * tall, dy: "0.32em", "text-anchor": "end" }, text));
    });
    const ticks = linearTicks(xLow, xHigh, Math.max(2, Math.floor(width / 110)));
    const xText = tickLabel(ticks, drawing.xFormat);
    for (const tick of ticks) {
      const at = x(tick);
      grid.append(svg("line", { class: "tick", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 }));
      grid.append(svg("text", { x: at, y: box.bottom + 16, "text-anchor": at > box.right - 14 ? "end" : "middle" }, xText(tick)));
    }
    grid.append(svg("text", { class: "label", x: box.right, y: height - 3, "text-anchor": "end" }, drawing.xLabel));
    const over = svg("g", { class: "over" });
    root.append(grid, over);
    this.plot.replaceChildren(canvas, root);
    const bar = h("i", { class: "bar" });
    bar.style.background = `linear-gradient(90deg, ${[0, 1, 2, 3, 4, 5, 6, 7, 8].map((each) => sequential(each / 8)).join(",")})`;
    this.legend.replaceChildren(h("span", { class: "scale" }, short(low, 3), bar, short(high, 3)));

    const surface = { root, over, x, box, xOf: (pixel) => xLow + ((pixel - box.left) / (box.right - box.left)) * (xHigh - xLow) };
    let row = 0;
    root.addEventListener("pointermove", (event) => {
      const down = (event.clientY - root.getBoundingClientRect().top - box.top) / tall;
      row = Math.max(0, Math.min(rows.length - 1, Math.floor(down)));
    }, true);
    this.listen(surface, xs.filter((value) => value >= xLow && value <= xHigh), (value) => {
      const at = nearest(xs, value);
      const cell = values[row][at];
      return { title: drawing.xTitle(value), rows: [[`${drawing.rowLabel} ${rows[row]}`, drawing.format(cell), good(cell) ? color(cell) : null]] };
    });
  }
}
