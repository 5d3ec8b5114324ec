"use strict";

const AXES = { step: "steps", epoch: "epochs", time: "time", tokens: "tokens", samples: "samples" };
const PHASES = ["data_wait", "transfer", "step", "callbacks", "validation", "checkpoint", "other"];
const SPLITS = { train: "train", training: "train", val: "val", valid: "val", validation: "val", eval: "val", test: "test" };
const SPLIT = "(train|training|val|valid|validation|eval|test)";

// Which axes a run can be drawn over.
function axesOf(run) {
  const axes = ["step"];
  if (run.epoch_ends.length) axes.push("epoch");
  if (run.started) axes.push("time");
  if (run.tokens) axes.push("tokens");
  if (run.samples_per_step) axes.push("samples");
  return axes;
}

// The place of each point on an axis; null if the run does not know it.
function placesOf(run, columns, axis) {
  if (axis === "step") return columns.x;
  if (axis === "time") return columns.t;
  if (axis === "samples") return run.samples_per_step ? columns.x.map((x) => x * run.samples_per_step) : null;
  if (axis === "tokens") return run.tokens ? interpolated(columns.x, run.tokens) : null;
  if (!run.epoch_ends.length) return null;
  // An epoch ends at its last step, and each point lies in it by its share of the steps.
  const ends = run.epoch_ends;
  const table = [[0, ends[0][0]], ...ends.map(([epoch, step]) => [step, epoch + 1])];
  const open = ends.length > 1 && ends[ends.length - 1][1] - ends[ends.length - 2][1];
  if (open && open < ends[0][1]) table[table.length - 1][1] = ends[ends.length - 1][0] + open / ends[0][1];
  return interpolated(columns.x, table);
}

function interpolated(xs, table) {
  let i = 0;
  return xs.map((x) => {
    if (x < table[i][0]) i = 0;
    while (i < table.length - 2 && table[i + 1][0] < x) i += 1;
    const [[a, low], [b, high]] = [table[i], table[i + 1] || table[i]];
    return b > a ? low + ((x - a) / (b - a)) * (high - low) : high;
  });
}

// An exponential mean whose memory is a part of the axis, so that it does not depend on how often a run logged; without
// the bias of its first value.
function smoothed(xs, ys, weight, span) {
  const values = new Array(ys.length);
  let mean = 0, total = 0, last = xs[0];
  for (let i = 0; i < ys.length; i += 1) {
    if (ys[i] === null) { values[i] = null; continue; }
    const decay = Math.pow(weight, Math.max(((xs[i] - last) / span) * 250, total ? 1e-9 : 0));
    const share = total ? decay : 0;
    mean = mean * share + ys[i] * (1 - weight);
    total = total * share + (1 - weight);
    last = xs[i];
    values[i] = mean / total;
  }
  return values;
}

// What a metric's name says: which part of the data it is of, whether it is an epoch's mean, and the rest.
function nameParts(name) {
  let rest = name, split = "", kind = "";
  const ending = rest.match(/^(.+)_(step|epoch)$/);
  if (ending) [, rest, kind] = ending;
  const before = rest.match(new RegExp(`^${SPLIT}[/_.\\- ](.+)$`, "i"));
  const after = rest.match(new RegExp(`^(.+)[/_.\\- ]${SPLIT}$`, "i"));
  if (before) [split, rest] = [SPLITS[before[1].toLowerCase()], before[2]];
  else if (after) [rest, split] = [after[1], SPLITS[after[2].toLowerCase()]];
  return { rest, split, kind };
}

// Where a metric is drawn: in which group, and in which plot of it.
function placeOf(name, paired, several) {
  if (/^(monitor\/)?lr([-/]|$)/i.test(name) || /^(learning_rate|lr)$/i.test(name)) {
    return { group: "Optimizer", plot: "Learning rate", label: name.replace(/^(monitor\/)?lr[-/]/, ""), order: 1 };
  }
  if (/^(monitor\/)?(grad_?norm|gradient_norm)/i.test(name)) {
    return { group: "Optimizer", plot: "Gradient norm", label: name === "monitor/grad_norm" ? "Gradient norm" : name, order: 1 };
  }
  if (name.startsWith("monitor/")) {
    const rest = name.slice(8);
    if (PHASES.includes(rest)) {
      const plot = several ? `Part of the time: ${rest.replace("_", " ")}` : "Parts of the time";
      return { group: "Speed and memory", plot, label: rest.replace("_", " "), order: 2 };
    }
    if (/per_second/.test(rest)) return { group: "Speed and memory", plot: sentence(rest), label: sentence(rest), order: 2 };
    return { group: "Speed and memory", plot: sentence(rest), label: sentence(rest), order: 2 };
  }
  const parts = paired ? nameParts(name) : { rest: name, split: "", kind: "" };
  const slash = parts.rest.indexOf("/");
  return {
    group: slash > 0 ? parts.rest.slice(0, slash) : "Metrics",
    plot: parts.rest,
    label: [parts.split || (paired ? "" : name), parts.kind && `(${parts.kind})`].filter(Boolean).join(" ") || name,
    split: parts.split,
    order: 0,
  };
}

const sentence = (name) => {
  const text = name.replace(/_/g, " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
};

// All plots of some runs, in groups: [{title, plots: [{title, lines}]}]. A line has its run, its metric and its values.
function plotsOf(runs, paired) {
  const groups = new Map();
  runs.forEach((run) => {
    for (const [name, series] of Object.entries(run.series)) {
      // What LearningRateMonitor logs is the same curve.
      if (name.startsWith("monitor/lr/") && run.series[`lr-${name.slice(11)}`]) continue;
      const place = placeOf(name, paired, runs.length > 1);
      const group = groups.get(place.group) || { title: place.group, order: place.order, plots: new Map() };
      groups.set(place.group, group);
      const plot = group.plots.get(place.plot) || { title: place.plot, lines: [], format: formatterOf(name) };
      group.plots.set(place.plot, plot);
      plot.lines.push({ run, name, series, label: place.label, split: place.split || "" });
    }
  });
  const all = [...groups.values()].sort((a, b) => a.order - b.order || (b.title === "Metrics") - (a.title === "Metrics"));
  for (const group of all) {
    group.plots = [...group.plots.values()];
    for (const plot of group.plots) styleLines(plot, runs.length > 1);
    // What was one value only, such as a test's, stands behind the curves.
    group.plots.sort((a, b) => isSingle(a) - isSingle(b) || rank(a.title) - rank(b.title));
  }
  return all;
}

const isSingle = (plot) => plot.lines.every((line) => line.series.count < 2);
const rank = (title) => (/loss/i.test(title) ? 0 : /acc|f1|auroc|auc|score|bleu|perplexity/i.test(title) ? 1 : 2);

// One run: a colour for each line. Several: a colour for each run, and dashes tell a run's lines apart.
function styleLines(plot, several) {
  const order = { train: 0, "": 1, val: 2, test: 3 };
  plot.lines.sort((a, b) => a.run.index - b.run.index || order[a.split] - order[b.split] || (a.name < b.name ? -1 : 1));
  const labels = [...new Set(plot.lines.map((line) => line.label))];
  plot.lines.forEach((line, i) => {
    const place = labels.indexOf(line.label);
    line.hue = several ? line.run.index : PHASE_HUES[line.name.replace("monitor/", "")] ?? i;
    const turn = line.name.startsWith("monitor/") && !several ? 0 : several ? Math.floor(line.run.index / 10) + place : Math.floor(i / 10) + (line.split === "val" ? 1 : 0);
    line.dash = DASHES[turn % DASHES.length];
    line.title = several ? line.run.name + (labels.length > 1 ? ` · ${line.label}` : "") : line.label;
  });
}
