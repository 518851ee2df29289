// Line and share charts in SVG: scales, ticks, a cursor shared by all charts, tooltips by mouse, touch and arrow keys.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

// An HTML or SVG element with attributes and children; text is set as text, never parsed.
function make(tag, attributes = {}, ...children) {
  const isSvg = /^(svg|g|path|line|text|circle|rect)$/.test(tag);
  const node = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// The largest of 1, 2, 5, 10 ... that divides `span` into about `count` parts.
function niceStep(span, count) {
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const ratio = rough / power;
  return power * (ratio > 5 ? 10 : ratio > 2 ? 5 : ratio > 1 ? 2 : 1);
}

function linearTicks(low, high, count) {
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1)
    ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// 1, 2 and 5 of every decade, or whole decades where there are many; plain ticks within less than a decade.
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1) return linearTicks(low, high, count);
  const factors = decades <= count / 3 ? [1, 2, 5] : decades <= count ? [1, 3] : [1];
  const stride = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += stride)
    for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(3)));
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

// A function from values to pixels; padded to nice borders. Log scales need positive values.
function makeScale({ values, log, fromZero, cap }) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || (log && value <= 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
  if (log) {
    if (low === high) [low, high] = [low / 2, high * 2];
    const pad = (high / low) ** 0.04;
    [low, high] = [low / pad, high * pad];
    return {
      low,
      high,
      ticks: (count) => logTicks(low, high, count),
      at: (v) => Math.log(Math.max(v, low) / low) / Math.log(high / low),
    };
  }
  if (fromZero) low = Math.min(0, low);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const step = niceStep(high - low, 5);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  if (cap !== undefined) high = Math.min(high, cap);
  return { low, high, ticks: (count) => linearTicks(low, high, count), at: (v) => (v - low) / (high - low) };
}

// The value of a line fitted around each entry, its neighbours on both sides weighted by weight ** distance: it follows
// a falling curve without the lag that a running average has. null where the value is.
function smooth(values, weight) {
  const sweep = (order, sign) => {
    const moments = new Array(values.length);
    let [n, x, xx, y, xy] = [0, 0, 0, 0, 0];
    for (const i of order) {
      [n, x, xx, y, xy] = [n, x - sign * n, xx - sign * 2 * x + n, y, xy - sign * y].map((sum) => sum * weight);
      if (values[i] !== null) [n, y] = [n + 1, y + values[i]];
      moments[i] = [n, x, xx, y, xy];
    }
    return moments;
  };
  const order = [...values.keys()];
  const before = sweep(order, 1);
  const after = sweep(order.reverse(), -1);
  return values.map((value, i) => {
    if (value === null) return null;
    const [n, x, xx, y, xy] = before[i].map((sum, k) => sum + after[i][k] - [1, 0, 0, value, 0][k]);
    const spread = n * xx - x * x;
    return spread > 1e-9 ? (xx * y - x * xy) / spread : value;
  });
}

const pathOf = (points) => {
  let pen = false;
  const parts = [];
  for (const [x, y] of points) {
    if (y === null) pen = false;
    else {
      parts.push(`${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`);
      pen = true;
    }
  }
  return parts.join("");
};

// One chart. spec: {id, title, unit, series, axis: value -> text, exact: value -> text, height, log, fromZero, cap,
// smoothing, slider, now}. Without a slider the smoothing is fixed. A series is {name, tone, x: [steps], y: [values],
// low, high, kind: "line" | "dots", faint}.
// Charts draw at their real width, so that text has its size on every screen; `Charts` redraws and moves the cursor.
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.log = recall(`${spec.id}.log`, false);
    this.smoothing = spec.slider ? recall(`${spec.id}.smoothing`, spec.smoothing) : (spec.smoothing ?? 0);
    this.plot = make("div");
    this.tip = make("div", { class: "tip", role: "status" });
    this.legend = make("ul", { class: "legend" });
    const tools = this.tools();
    this.node = make(
      "figure",
      { class: "card chart", id: `chart-${spec.id}` },
      make(
        "header",
        {},
        make("h3", {}, spec.title, spec.unit ? make("span", {}, ` ${spec.unit}`) : null),
        spec.now ? make("span", { class: "now" }, spec.now) : null,
        tools,
      ),
      this.plot,
      this.legend,
      this.tip,
    );
    Charts.add(this);
  }

  tools() {
    const { id, log, slider } = this.spec;
    if (!log && !slider) return null;
    const box = make("div", { class: "tools" });
    if (slider) {
      const shown = make("output", {}, this.smoothing.toFixed(2));
      box.append(
        make(
          "label",
          {},
          "Smoothing",
          make("input", {
            type: "range",
            min: 0,
            max: 0.99,
            step: 0.01,
            value: this.smoothing,
            "aria-label": `${this.spec.title}: smoothing`,
            oninput: (event) => {
              this.smoothing = remember(`${id}.smoothing`, Number(event.target.value));
              shown.textContent = this.smoothing.toFixed(2);
              this.draw();
            },
          }),
          shown,
        ),
      );
    }
    if (log)
      box.append(
        make(
          "label",
          {},
          make("input", {
            type: "checkbox",
            checked: this.log,
            "aria-label": `${this.spec.title}: logarithmic scale`,
            onchange: (event) => {
              this.log = remember(`${id}.log`, event.target.checked);
              this.draw();
            },
          }),
          "Log scale",
        ),
      );
    return box;
  }

  // What is drawn. With smoothing every line becomes a faint raw one (unseen among many) and a smoothed one.
  curves() {
    const many = this.spec.series.length > 3;
    return this.spec.series.flatMap((series) => {
      if (series.kind === "dots" || this.smoothing === 0) return [series];
      const name = this.spec.slider ? `${series.name}, smoothed` : series.name;
      return [
        { ...series, faint: true, unseen: many },
        { ...series, name, y: smooth(series.y, this.smoothing), low: undefined, smoothed: true },
      ];
    });
  }

  draw() {
    const { spec } = this;
    const width = Math.max(240, this.plot.clientWidth || 600);
    const height = spec.height ?? 210;
    const curves = this.curves();
    const scale = makeScale({
      values: spec.stack ? [0, 1] : curves.flatMap((c) => (c.low ? [...c.low, ...c.high, ...c.y] : c.y)),
      log: this.log,
      fromZero: spec.fromZero,
      cap: spec.cap,
    });
    const yTicks = scale.ticks(Math.max(3, Math.floor(height / 48)));
    const labels = yTicks.map((tick) => spec.axis(tick));
    const left = 14 + 6.6 * Math.max(...labels.map((label) => label.length), 2);
    const [right, top, bottom] = [12, 10, 36];
    const steps = Charts.range;
    const x = (step) => left + ((step - steps[0]) / Math.max(1, steps[1] - steps[0])) * (width - left - right);
    const y = (value) => (value === null ? null : height - bottom - scale.at(value) * (height - bottom - top));
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      tabindex: 0,
      "aria-label": this.describe(),
    });
    yTicks.forEach((tick, i) =>
      svg.append(
        make("line", { class: "gridline", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        make("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, labels[i]),
      ),
    );
    for (const tick of linearTicks(steps[0], steps[1], Math.floor((width - left) / 64)).filter((t) =>
      Number.isInteger(t),
    ))
      svg.append(make("text", { x: x(tick), y: height - bottom + 17, "text-anchor": "middle" }, short(tick)));
    svg.append(
      make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "step"),
    );
    if (curves.every((curve) => curve.y.every((value) => value === null)))
      svg.append(
        make("text", { x: (left + width - right) / 2, y: height / 2, "text-anchor": "middle" }, "no values yet"),
      );
    if (spec.stack) this.bars(svg, x, y);
    else for (const curve of curves.filter((c) => !c.unseen)) this.line(svg, curve, x, y);
    this.cursor = make("line", { class: "cursor", y1: top, y2: height - bottom });
    svg.append(this.cursor);
    this.marks = spec.stack
      ? []
      : curves
          .filter((c) => !c.faint)
          .map((curve) => {
            const mark = make("circle", { r: 4, class: "dot", fill: curve.tone, visibility: "hidden" });
            svg.append(mark);
            return [curve, mark];
          });
    this.place = { x, y, left, right, width, height };
    this.drawn = curves;
    this.listen(svg);
    this.plot.replaceChildren(svg);
    this.legend.replaceChildren(
      ...curves
        .filter((c) => spec.slider || (spec.series.length > 1 && !c.faint))
        .map((curve) =>
          make(
            "li",
            {},
            make("span", {
              class: ["swatch", curve.faint && "faint", spec.stack && "block", curve.kind === "dots" && "dotted"]
                .filter(Boolean)
                .join(" "),
              style: `--tone:${curve.tone}`,
            }),
            curve.name,
          ),
        ),
    );
  }

  line(svg, curve, x, y) {
    if (curve.low) {
      const upper = curve.x.map((step, i) => [x(step), y(curve.high[i])]).filter((p) => p[1] !== null);
      const lower = curve.x
        .map((step, i) => [x(step), y(curve.low[i])])
        .filter((p) => p[1] !== null)
        .reverse();
      svg.append(make("path", { class: "band", d: `${pathOf([...upper, ...lower])}Z`, fill: curve.tone }));
    }
    const points = curve.x.map((step, i) => [x(step), y(curve.y[i])]);
    svg.append(
      make("path", {
        class: `line ${curve.faint ? "raw" : ""}`,
        d: pathOf(points),
        stroke: curve.tone,
        "data-series": curve.name,
      }),
    );
    const marked = curve.kind === "dots" && points.length <= 60;
    const missing = (point) => (point?.[1] ?? null) === null;
    points.forEach((point, i) => {
      if (!missing(point) && (marked || (missing(points[i - 1]) && missing(points[i + 1]))))
        svg.append(make("circle", { class: "dot", cx: point[0], cy: point[1], r: 3.5, fill: curve.tone }));
    });
  }

  // Shares of a whole, one column for each range of steps.
  bars(svg, x, y) {
    const { series } = this.spec;
    series[0].x.forEach((end, i) => {
      const from = x(series[0].from[i]);
      let below = 0;
      for (const { y: shares, tone } of series) {
        if (shares[i])
          svg.append(
            make("rect", {
              x: from,
              width: Math.max(0.5, x(end) - from + 0.4),
              y: y(below + shares[i]),
              height: y(below) - y(below + shares[i]),
              fill: tone,
            }),
          );
        below += shares[i] ?? 0;
      }
    });
    for (const { name, tone, x: steps } of series)
      svg.append(make("path", { "data-series": name, "data-columns": steps.length, d: "", fill: tone }));
  }

  describe() {
    return (
      `${this.spec.title}${this.spec.unit ? `, ${this.spec.unit}` : ""}, over steps. ` +
      this.spec.series
        .map((series) => {
          const known = series.y.map((value, i) => [series.x[i], value]).filter(([, value]) => value !== null);
          if (!known.length) return `${series.name}: no values.`;
          const [[firstStep, first], [lastStep, last]] = [known[0], known[known.length - 1]];
          const say = this.spec.exact;
          return `${series.name}: ${say(first)} at step ${firstStep}, ${say(last)} at step ${lastStep}.`;
        })
        .join(" ") +
      " Arrow keys read single steps."
    );
  }

  listen(svg) {
    const at = (event) => {
      const box = svg.getBoundingClientRect();
      const { left, right, width } = this.place;
      const share = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
      const [low, high] = Charts.range;
      Charts.show(this, Math.min(high, Math.max(low, low + share * (high - low))));
    };
    svg.addEventListener("pointermove", at);
    svg.addEventListener("pointerdown", at);
    svg.addEventListener("pointerleave", () => Charts.hide());
    svg.addEventListener("blur", () => Charts.hide());
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const steps = this.spec.series[0].x;
      const now = this.index ?? (move < 0 ? steps.length : -1);
      this.index = Math.min(steps.length - 1, Math.max(0, now + move));
      Charts.show(this, steps[this.index]);
    });
  }

  // The cursor at `step`; with `speak` also the tooltip, with the exact values.
  point(step, speak) {
    const { x, y, width, height } = this.place;
    this.cursor.setAttribute("x1", x(step));
    this.cursor.setAttribute("x2", x(step));
    this.cursor.style.visibility = "visible";
    for (const [curve, mark] of this.marks) {
      const i = nearest(curve.x, step);
      const seen = i >= 0 && curve.y[i] !== null;
      if (seen)
        [
          ["cx", x(curve.x[i])],
          ["cy", y(curve.y[i])],
        ].forEach(([key, value]) => mark.setAttribute(key, value));
      mark.setAttribute("visibility", seen ? "visible" : "hidden");
    }
    if (!speak) return;
    const base = this.drawn[0];
    const at = base.x[nearest(base.x, step)];
    const told = this.drawn.filter((curve) => this.spec.slider || !curve.smoothed);
    const rows = told
      .map((curve) => [curve, nearest(curve.x, step)])
      .filter(([curve, i]) => i >= 0 && curve.y[i] !== null);
    this.tip.replaceChildren(
      make(
        "b",
        {},
        `step ${at.toLocaleString("en")}${this.spec.width > 1 ? `, mean of ${this.spec.width} steps` : ""}`,
      ),
      ...rows.map(([curve, i]) =>
        make(
          "div",
          {},
          make("span", {
            class: `swatch ${curve.faint && this.spec.slider ? "faint" : ""}`,
            style: `--tone:${curve.tone}`,
          }),
          make(
            "span",
            {},
            curve.kind === "dots" && curve.x[i] !== at ? `${curve.name} (step ${curve.x[i]})` : curve.name,
          ),
          make("span", {}, this.spec.exact(curve.y[i])),
        ),
      ),
    );
    const [tipWidth, plotLeft] = [this.tip.offsetWidth, this.plot.offsetLeft];
    const shown = (x(step) / width) * this.plot.clientWidth;
    const start = shown + tipWidth + 20 > this.plot.clientWidth ? shown - tipWidth - 14 : shown + 14;
    const y0 = this.plot.offsetTop + Math.max(0, Math.min(24, height - this.tip.offsetHeight));
    this.tip.style.transform = `translate(${plotLeft + Math.max(-6, start)}px, ${y0}px)`;
    this.tip.style.visibility = "visible";
  }

  unpoint() {
    this.cursor.style.visibility = "hidden";
    this.tip.style.visibility = "hidden";
    this.marks.forEach(([, mark]) => mark.setAttribute("visibility", "hidden"));
  }
}

// All charts of the page: one range of steps, one cursor.
const Charts = {
  all: [],
  range: [1, 1],
  add(chart) {
    this.all.push(chart);
  },
  draw() {
    this.all.forEach((chart) => chart.draw());
  },
  show(chosen, step) {
    this.all.forEach((chart) => {
      if (chart !== chosen) chart.unpoint();
      chart.point(step, chart === chosen);
    });
  },
  hide() {
    this.all.forEach((chart) => chart.unpoint());
  },
};

// Index of the entry of ascending `steps` nearest to `step`, or -1 where there is none.
function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : steps.length ? low : -1;
}

// Settings live as long as the tab, so that they outlast the reloads of a running report.
function recall(key, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(`tutti.${key}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function remember(key, value) {
  try {
    sessionStorage.setItem(`tutti.${key}`, JSON.stringify(value));
  } catch {
    // A page without storage forgets.
  }
  return value;
}
