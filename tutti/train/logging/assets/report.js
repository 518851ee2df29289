// The page: header, key figures, charts, texts, data, layout, configuration. Everything comes from the #data element.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const { run, figures, sources, train, evals } = DATA;
const column = (table, name) => table.columns[name]?.mean;
const ANSWERS = [
  { name: "sample_accuracy", count: "sample_answers", of: "", label: "Right", color: "var(--second)" },
  {
    name: "unseen_accuracy",
    count: "unseen_answers",
    of: " to rows that it is not trained on",
    label: "Right, to rows not trained on",
    color: "var(--accent)",
  },
];
const known = (values) => values?.some((value) => value !== null && value !== 0);

const dataType = run.config?.find((row) => row.name === "data.data_type")?.value;
const lossUnit = dataType === "classification" ? "nats per sample" : "nats per trained token";
const step = figures.last.step ?? figures.last_eval.step ?? 0;
const total = run.total_steps ?? step;
const secondsAgo = run.updated ? Date.now() / 1000 - run.updated : 0;
const stale = run.status === "running" && secondsAgo > Math.max(120, 20 * (figures.last.step_seconds ?? 0));
const status = stale ? "silent" : run.status;
const TONES = { running: "accent", finished: "good", stopped: "warn", failed: "bad", silent: "warn" };
const tone = `--tone:var(--${TONES[status] ?? "accent"})`;

function header() {
  const words = { running: "Running", finished: "Finished", stopped: "Stopped", failed: "Failed", silent: "No news" };
  const bars = make("svg", { viewBox: "0 0 24 24", "aria-hidden": true });
  for (const [x, y, height] of [
    [1, 10, 8],
    [7.5, 4, 16],
    [14, 7, 11],
    [20, 11, 5],
  ])
    bars.append(make("rect", { x, y, width: 3.6, height, rx: 1.8 }));
  const when = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const about = [
    run.model,
    run.device,
    run.started ? `started ${when(run.started)}` : null,
    run.resumed?.length ? `resumed after step ${run.resumed.map(whole).join(", ")}` : null,
    ...(run.branches ?? []).map((left) => `branched off at step ${whole(left.step)}, the rest is in ${left.folder}`),
    run.updated ? `updated ${when(run.updated)}` : null,
  ].filter(Boolean);
  const left =
    run.status === "running" && !stale && step && total > step ? (figures.train_seconds / step) * (total - step) : null;
  const share = total ? Math.min(1, step / total) : 0;
  return make(
    "header",
    {},
    make("div", { class: "brand" }, bars, "Tutti"),
    make(
      "div",
      { class: "head" },
      make("h1", {}, run.name),
      make("span", { class: "pill", id: "status", "data-status": status, style: tone }, words[status] ?? status),
    ),
    make("p", { class: "about" }, about.join("  ·  ")),
    make(
      "div",
      { class: "progress", style: tone },
      make(
        "div",
        {
          role: "progressbar",
          "aria-label": "Progress",
          "aria-valuemin": 0,
          "aria-valuemax": total,
          "aria-valuenow": step,
        },
        make("i", { style: `width:${share * 100}%` }),
      ),
      make(
        "p",
        {},
        make("span", { id: "progress" }, `step ${whole(step)} of ${whole(total)}`),
        make("span", {}, left === null ? percent(share, 0) : `${percent(share, 0)}, about ${duration(left)} left`),
      ),
    ),
    run.message ? make("p", { class: "banner", role: "alert", id: "message", style: tone }, run.message) : null,
    stale
      ? make(
          "p",
          { class: "banner", style: tone },
          `The last news is ${duration(secondsAgo)} old: the process may have been killed.`,
        )
      : null,
    figures.non_finite.length
      ? make(
          "p",
          { class: "banner", id: "non-finite", style: "--tone:var(--bad)" },
          `Not a finite number: ${figures.non_finite
            .slice(0, 5)
            .map(([at, what]) => `${what} at step ${whole(at)}`)
            .join(", ")}${figures.non_finite.length > 5 ? ` and ${figures.non_finite.length - 5} more` : ""}.`,
        )
      : null,
    figures.skipped
      ? make(
          "p",
          { class: "banner", style: "--tone:var(--warn)" },
          `${whole(figures.skipped)} steps changed nothing, because their gradient was not finite or they were spikes.`,
        )
      : null,
  );
}

function tile(id, name, value, note, full) {
  const [text, unit] = Array.isArray(value) ? value : [value];
  return make(
    "div",
    { class: "tile", id: `tile-${id}` },
    make("dt", {}, name),
    make("dd", { title: full }, text, unit ? make("small", {}, unit) : null),
    make("p", { title: note }, note ?? " "),
  );
}

function tiles() {
  const { last, best_eval: best, last_eval: evaluated } = figures;
  const speed = figures.train_seconds ? figures.tokens / figures.train_seconds : last.tokens_per_second;
  const losses = (column(train, "loss") ?? []).filter((value) => value !== null);
  const accuracy = evaluated.eval_accuracy;
  const seconds = run.seconds ?? figures.train_seconds;
  const trainable =
    run.trainable_parameters && run.trainable_parameters !== run.parameters
      ? `${short(run.trainable_parameters)} trained`
      : null;
  return make(
    "dl",
    { class: "tiles" },
    tile(
      "loss",
      run.status === "running" ? "Loss" : "Final loss",
      fixed(last.loss),
      losses.length > 1 ? `started at ${fixed(losses[0])}` : null,
      last.loss,
    ),
    best.eval_loss === undefined
      ? tile("eval", "Best eval loss", "–", "no evaluation yet")
      : tile(
          "eval",
          "Best eval loss",
          fixed(best.eval_loss),
          accuracy === undefined
            ? `at step ${whole(best.step)}`
            : `at step ${whole(best.step)}; accuracy ${percent(accuracy)}`,
          best.eval_loss,
        ),
    tile(
      "tokens",
      "Tokens",
      short(figures.tokens),
      `${short(figures.trained_tokens)} trained on`,
      whole(figures.tokens),
    ),
    tile(
      "time",
      "Time",
      duration(seconds),
      figures.train_seconds ? `${duration(figures.train_seconds)} in steps` : null,
    ),
    tile(
      "speed",
      "Throughput",
      [short(speed ?? 0), "tokens/s"],
      typeof last.mfu === "number"
        ? `MFU ${percent(last.mfu)}`
        : last.step_seconds
          ? `${fixed(last.step_seconds, 2)} s a step`
          : null,
    ),
    tile(
      "parameters",
      "Parameters",
      run.parameters ? short(run.parameters) : "–",
      trainable ?? (run.parameters ? whole(run.parameters) : null),
      run.parameters,
    ),
  );
}

const curve = (table, name, label, color = "var(--accent)") => ({
  name: label,
  tone: color,
  x: table.step,
  y: column(table, name) ?? table.step.map(() => null),
  low: table.columns[name]?.low,
  high: table.columns[name]?.high,
});
const ratios = (above, below) =>
  (below ?? []).map((value, i) => (value && above?.[i] != null ? above[i] / value : null));
const gentle = (values) => ((values?.length ?? 0) < 30 ? 0 : values.length < 100 ? 0.8 : 0.9);

function charts() {
  const lossSeries = [curve(train, "loss", "Training")];
  if (known(column(evals, "eval_loss")))
    lossSeries.push({ ...curve(evals, "eval_loss", "Evaluation", "var(--second)"), kind: "dots" });
  const single = (id, title, name, options) =>
    known(column(train, name))
      ? new Chart({ id, title, series: [curve(train, name, title)], width: train.width, exact, ...options }).node
      : null;
  const last = figures.last;
  const small = [
    single("lr", "Learning rate", "lr", { axis: power, now: power(last.lr ?? 0), fromZero: true }),
    single("grad_norm", "Gradient norm", "grad_norm", {
      axis: power,
      now: fixed(last.grad_norm, 3),
      log: true,
      smoothing: gentle(column(train, "grad_norm")),
      fromZero: true,
    }),
    single("throughput", "Throughput", "tokens_per_second", {
      unit: "tokens/s",
      axis: short,
      now: short(last.tokens_per_second ?? 0),
      smoothing: gentle(train.step),
      fromZero: true,
    }),
    single("packing", "Packing efficiency", "packing", {
      unit: "tokens per slot",
      axis: (v) => percent(v, 0),
      smoothing: gentle(train.step),
      fromZero: true,
      exact: (v) => percent(v, 2),
      now: percent(last.packing ?? 0),
      cap: 1,
    }),
    single("sample_length", "Sample length", "samples", {
      unit: "tokens per sample",
      axis: short,
      smoothing: gentle(train.step),
      fromZero: true,
      now: fixed(last.tokens / last.samples, 1),
      series: [
        {
          ...curve(train, "samples", "Sample length"),
          y: ratios(column(train, "tokens"), column(train, "samples")),
        },
      ],
    }),
    single("memory", "Memory", "memory_gib", {
      unit: "peak, GiB",
      axis: plain,
      now: fixed(last.memory_gib, 2),
      fromZero: true,
    }),
    single("mfu", "Model FLOPs utilization", "mfu", {
      axis: (v) => percent(v, 0),
      exact: (v) => percent(v, 2),
      now: percent(last.mfu ?? 0),
      smoothing: gentle(train.step),
      fromZero: true,
    }) ??
      single("step_seconds", "Step time", "step_seconds", {
        unit: "seconds",
        axis: plain,
        now: fixed(last.step_seconds, 2),
        smoothing: gentle(train.step),
        fromZero: true,
        series: [
          curve(train, "step_seconds", "Whole step"),
          ...(known(column(train, "data_seconds"))
            ? [curve(train, "data_seconds", "Waiting for data", "var(--second)")]
            : []),
        ],
      }),
    single("router_loss", "Router loss", "router_loss", {
      axis: power,
      now: fixed(last.router_loss),
      smoothing: gentle(train.step),
    }),
    single("expert_load_max", "Load of experts", "expert_load_max", {
      unit: "times an even share",
      axis: plain,
      now: fixed(last.expert_load_max, 2),
      smoothing: gentle(train.step),
      fromZero: true,
      series: [
        curve(train, "expert_load_max", "Busiest"),
        curve(train, "expert_load_min", "Least busy", "var(--second)"),
      ],
    }),
    single("rewards", "Rewards", "rewards/chosen", {
      axis: plain,
      now: fixed(last["rewards/margin"], 2),
      smoothing: gentle(train.step),
      series: [
        curve(train, "rewards/chosen", "Chosen"),
        curve(train, "rewards/rejected", "Rejected", "var(--second)"),
      ],
    }),
    single("reward_accuracy", "Pairs in the right order", "rewards/accuracy", {
      axis: (v) => percent(v, 0),
      exact: (v) => percent(v, 2),
      now: percent(last["rewards/accuracy"] ?? 0),
      smoothing: gentle(train.step),
      fromZero: true,
      cap: 1,
    }),
  ];
  if (known(column(evals, "eval_accuracy")))
    small.unshift(
      new Chart({
        id: "accuracy",
        title: "Evaluation accuracy",
        series: [{ ...curve(evals, "eval_accuracy", "Accuracy", "var(--second)"), kind: "dots" }],
        axis: (v) => percent(v, 0),
        exact: (v) => percent(v, 2),
        cap: 1,
        width: 1,
      }).node,
    );
  const asked = ANSWERS.filter(({ name }) => column(evals, name)?.some((value) => value !== null));
  if (asked.some(({ name }) => known(column(evals, name))))
    small.unshift(
      new Chart({
        id: "answers",
        title: "Right answers",
        series: asked.map(({ name, label, color }) => ({ ...curve(evals, name, label, color), kind: "dots" })),
        axis: (v) => percent(v, 0),
        exact: (v) => percent(v, 2),
        fromZero: true,
        cap: 1,
        width: 1,
      }).node,
    );
  return [
    new Chart({
      id: "loss",
      title: "Loss",
      unit: lossUnit,
      series: lossSeries,
      axis: power,
      exact,
      height: 340,
      log: true,
      slider: true,
      smoothing: gentle(column(train, "loss")),
      width: train.width,
    }).node,
    ...(small.some(Boolean)
      ? [make("h2", {}, "Optimization and hardware"), make("div", { class: "grid" }, small)]
      : []),
    ...(sources.length > 1 ? sourceCharts() : []),
    ...evaluationSourceChart(),
  ];
}

function evaluationSourceChart() {
  const prefix = "eval_source_loss/";
  const names = Object.keys(evals.columns).filter((name) => name.startsWith(prefix));
  if (names.length < 2) return [];
  const series = names.slice(0, 12).map((name, i) => ({
    ...curve(evals, name, name.slice(prefix.length), `var(--c${i})`),
    kind: "dots",
  }));
  return [
    make("h2", {}, "Evaluation sources"),
    new Chart({
      id: "eval_source_loss",
      title: "Evaluation loss by source",
      unit: lossUnit,
      series,
      axis: power,
      exact,
      height: 280,
      log: true,
      width: 1,
    }).node,
  ];
}

function sourceCharts() {
  const color = (i) => `var(--c${sources[i].rest ? 12 : i % 12})`;
  const losses = sources
    .map((source, i) => curve(train, `source_loss/${source.name}`, source.name, color(i)))
    .filter((series) => known(series.y));
  const all = sources.reduce((sum, source) => sum + source.tokens, 0);
  const share = shares(sources.map((source) => train.columns[`source_tokens/${source.name}`]?.sum ?? []));
  const stacked = sources.map((source, i) => ({
    name: `${source.name} (${percent(source.tokens / all)})`,
    tone: color(i),
    x: share.ends,
    from: share.starts,
    y: share.values[i],
  }));
  return [
    make("h2", {}, "Sources"),
    make(
      "div",
      { class: "grid", style: "--columns:2" },
      losses.length
        ? new Chart({
            id: "source_loss",
            title: "Loss by source",
            unit: lossUnit,
            series: losses,
            axis: power,
            exact,
            height: 280,
            log: true,
            smoothing: gentle(train.step),
            width: train.width,
          }).node
        : null,
      new Chart({
        id: "source_tokens",
        title: "Token share",
        unit: "of trained tokens",
        series: stacked,
        stack: true,
        axis: (v) => percent(v, 0),
        exact: (v) => percent(v, 2),
        height: 280,
        fromZero: true,
        cap: 1,
        width: 1,
      }).node,
    ),
  ];
}

// Shares of each source's tokens in at most 48 ranges of steps.
function shares(columns) {
  const size = Math.ceil(train.step.length / 48);
  const result = { starts: [], ends: [], values: columns.map(() => []) };
  for (let from = 0; from < train.step.length; from += size) {
    const to = Math.min(from + size, train.step.length);
    const sums = columns.map((values) => values.slice(from, to).reduce((sum, value) => sum + (value ?? 0), 0));
    const all = sums.reduce((a, b) => a + b, 0);
    result.starts.push(from ? train.step[from - 1] : 0);
    result.ends.push(train.step[to - 1]);
    sums.forEach((sum, i) => result.values[i].push(all ? sum / all : null));
  }
  return result;
}

// What the model added: an answer on lines of its own, or the text going on where the prompt ends.
function continuation(prompt, text, chat) {
  const added = text.startsWith(prompt) ? text.slice(prompt.length) : text;
  return chat ? added.trimStart() : added;
}

// How many of the prompts with an expected answer were answered so, now and when they were first asked: of those that
// the model is trained on, and of those that it is not.
function rightAnswers() {
  const lines = ANSWERS.flatMap(({ name, count: counted, of }) => {
    const { step: at, [name]: share, [counted]: count } = figures.answers;
    if (!count) return [];
    const first = evals.columns[name].mean.findIndex((value) => value !== null);
    const before = `${percent(evals.columns[name].mean[first])} at step ${whole(evals.step[first])}`;
    const now = `${whole(Math.round(share * count))} of ${whole(count)} answers${of} are right (${percent(share)})`;
    return [`${now}${evals.step[first] === at ? "" : `; ${before}`}.`];
  });
  return lines.length ? make("p", { id: "answers" }, lines.join(" ")) : null;
}

function texts() {
  if (!run.texts?.length) return [];
  const chat = dataType === "conversation";
  const written = ({ prompt, text }) =>
    make("pre", {}, make("mark", {}, prompt, chat ? "\n" : ""), continuation(prompt, text, chat));
  const seen = ({ pictures }) =>
    pictures?.length
      ? [make("p", { class: "seen" }, ...pictures.map((key) => make("img", { src: run.pictures[key], alt: "" })))]
      : [];
  const when = ({ step: at, right }) => {
    const found = right === true ? ": right" : right === false ? ": wrong" : "";
    return make("p", { class: "when" }, (at ? `after step ${whole(at)}` : "before training") + found);
  };
  const card = (item) => make("article", { class: "card" }, ...seen(item), written(item), when(item));
  const pair = (item) => {
    const first = run.texts.find((other) => other.prompt === item.prompt);
    const before = first && first.step !== item.step ? [written({ ...first, prompt: "" }), when(first)] : [];
    return make("article", { class: "card" }, ...seen(item), written(item), when(item), ...before);
  };
  const cards = (items, form) =>
    make("div", { class: "grid texts", style: `--columns:${Math.min(2, items.length)}` }, items.map(form));
  const latest = run.texts[run.texts.length - 1].step;
  const older = run.texts.filter((item) => item.step !== latest).reverse();
  return [
    make("h2", {}, "What the model writes"),
    rightAnswers(),
    cards(
      run.texts.filter((item) => item.step === latest),
      pair,
    ),
    older.length
      ? make(
          "details",
          { class: "card", style: "margin-top:14px" },
          make("summary", {}, "Earlier ", make("span", {}, `(${older.length})`)),
          make("div", { style: "margin-top:12px" }, cards(older, card)),
        )
      : null,
  ];
}

const label = (key) => {
  const words = String(key).replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
};
const say = (value) =>
  value === null
    ? "–"
    : typeof value === "number"
      ? Number.isInteger(value)
        ? whole(value)
        : exact(Number(value.toPrecision(5)))
      : typeof value === "object"
        ? Object.entries(value)
            .map(([key, item]) => (Array.isArray(value) ? say(item) : `${key} ${say(item)}`))
            .join(", ") || "none"
        : String(value);
const facts = (entries) =>
  make(
    "dl",
    { class: "facts" },
    entries.flatMap(([key, value]) => [make("dt", {}, label(key)), make("dd", {}, say(value))]),
  );
const panel = (id, title, ...content) => make("section", { class: "card", id }, make("h3", {}, title), content);

function dataPanel() {
  const data = run.data ?? {};
  const { rows, dropped = {}, ...rest } = data;
  const gone = Object.entries(dropped);
  const lost = gone.reduce((sum, [, count]) => sum + count, 0);
  const bar = (name, count, color) =>
    make(
      "div",
      { style: `--tone:var(--${color})` },
      make("p", {}, make("span", {}, name), make("span", {}, `${whole(count)} (${percent(rows ? count / rows : 0)})`)),
      make("div", {}, make("i", { style: `width:${rows ? (100 * count) / rows : 0}%` })),
    );
  return panel(
    "data-report",
    "Data",
    rows
      ? make(
          "div",
          { class: "bars" },
          bar("Rows kept", rows - lost, "good"),
          gone.map(([reason, count]) => bar(`Dropped: ${reason}`, count, "second")),
        )
      : null,
    facts([
      ...Object.entries(rest).map(([key, value]) =>
        /packing|efficiency/.test(key) && typeof value === "number" ? [key, percent(value)] : [key, value],
      ),
    ]),
    run.steps_reason ? make("p", { class: "about" }, run.steps_reason) : null,
  );
}

function details() {
  const panels = [];
  if (run.data) panels.push(dataPanel());
  if (run.layout)
    panels.push(
      panel(
        "layout",
        "Layout",
        typeof run.layout === "object" ? facts(Object.entries(run.layout)) : make("p", { class: "facts" }, run.layout),
      ),
    );
  if (run.versions) panels.push(panel("versions", "Versions", facts(Object.entries(run.versions))));
  if (run.summary && Object.keys(run.summary).length)
    panels.push(panel("summary", "Summary", facts(Object.entries(run.summary))));
  return panels.length
    ? [
        make("h2", {}, "The run"),
        make("div", { class: "grid", style: `--columns:${Math.min(3, panels.length)}` }, panels),
      ]
    : [];
}

function configuration() {
  if (!run.config?.length) return [];
  const set = run.config.filter((row) => row.set).length;
  const value = (item) =>
    item === null
      ? "none"
      : Array.isArray(item)
        ? item.join(", ") || "[]"
        : typeof item === "object"
          ? JSON.stringify(item)
          : String(item);
  const body = make(
    "tbody",
    {},
    run.config.map((row) =>
      make(
        "tr",
        { class: row.set ? "set" : null },
        make("th", { scope: "row", class: "mono" }, row.name),
        make("td", { class: "mono" }, value(row.value)),
        make("td", {}, row.doc),
      ),
    ),
  );
  const box = make("input", {
    type: "checkbox",
    onchange: (event) => body.classList.toggle("only-set", event.target.checked),
  });
  return [
    make(
      "details",
      { class: "card config-card", id: "config", style: "margin-top:14px" },
      make(
        "summary",
        {},
        "Configuration ",
        make("span", {}, `${run.config.length} arguments, ${set} away from their default`),
      ),
      make(
        "div",
        { class: "tools", style: "margin-top:10px" },
        make("label", {}, box, "Only those away from their default"),
      ),
      make("table", { class: "config" }, body),
    ),
  ];
}

Charts.range = [0, Math.max(1, step)];
document
  .getElementById("page")
  .append(
    ...[
      header(),
      tiles(),
      ...charts(),
      ...texts(),
      ...details(),
      ...configuration(),
      make("footer", {}, "Made from metrics.jsonl and run.json, which lie beside this page."),
    ].filter(Boolean),
  );
Charts.draw();
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) Charts.draw();
  drawnWidth = innerWidth;
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((node) => (node.open = true)));
if (run.status === "running")
  setInterval(() => {
    if (
      document.visibilityState === "visible" &&
      !document.querySelector(":hover.chart, details[open]") &&
      !String(getSelection())
    )
      location.reload();
  }, 20000);
document.documentElement.dataset.ready = "true";
