"use strict";

// One hue each, from light to dark in either theme; the step itself, which one wants to see most of, is blue.
const PHASE_HUES = { step: 0, data_wait: 1, transfer: 4, callbacks: 3, validation: 2, checkpoint: 5, other: 9, start: 6 };
const phaseName = (name) => ({ data_wait: "waiting for data", transfer: "transfer to the device", step: "training steps", callbacks: "callbacks and loggers" }[name] || name.replace(/_/g, " "));

function phasesOf(seconds) {
  const names = Object.keys(seconds).filter((name) => !["epoch", "total", "wall"].includes(name));
  return names.sort((a, b) => (PHASE_HUES[a] ?? 8) - (PHASE_HUES[b] ?? 8)).map((name) => [name, seconds[name]]).filter(([, value]) => value > 0);
}

const phaseColour = (name) => colourOf(PHASE_HUES[name] ?? 8);
const sumOf = (phases) => phases.reduce((sum, [, value]) => sum + value, 0);

function strip(phases, whole, isBig) {
  const total = whole || sumOf(phases) || 1;
  const told = phases.map(([name, value]) => `${phaseName(name)} ${percent(value / total)}`).join(", ");
  return h("div", { class: isBig ? "strip big" : "strip", role: "img", "aria-label": told, title: told },
    phases.map(([name, value]) => h("i", { style: { width: `${(value / total) * 100}%`, background: phaseColour(name) } })));
}

// Where the time of each run went: a bar for the run, one for each epoch.
function timeSection(runs) {
  const timed = runs.filter((run) => run.timings.run && phasesOf(run.timings.run).length);
  if (!timed.length) return null;
  const names = [...new Set(timed.flatMap((run) => phasesOf(run.timings.run).map(([name]) => name)))];
  const content = timed.length === 1 ? timeOfRun(timed[0]) : timeOfRuns(timed, names);
  return h("section", { class: "section", id: "time", "aria-labelledby": "time-title" }, h("h2", { id: "time-title" }, "Where the time went"), content);
}

function keysOf(phases, total) {
  return h("ul", { class: "keys" }, phases.map(([name, value]) =>
    h("li", null, h("i", { style: { background: phaseColour(name) } }), phaseName(name), " ",
      total ? [h("b", null, percent(value / total)), " ", h("span", null, duration(value))] : null)));
}

function timeOfRun(run) {
  const phases = phasesOf(run.timings.run);
  const total = sumOf(phases);
  const epochs = run.timings.epochs;
  const longest = Math.max(...epochs.map((epoch) => sumOf(phasesOf(epoch))), 1e-9);
  const start = sumOf(phasesOf(run.timings.start)) || run.timings.start.total || 0;
  return h("div", { class: "panel" },
    strip(phases, total, true), keysOf(phases, total),
    start ? h("p", { class: "at" }, `Before the first step: ${duration(start)}.`) : null,
    epochs.length > 1 ? h("div", { class: "epochs", tabindex: 0, role: "region", "aria-label": "Time of each epoch" },
      h("div", { class: "share" }, epochs.map((epoch) => {
        const parts = phasesOf(epoch);
        return [h("span", null, `Epoch ${epoch.epoch}`), strip(parts, longest), h("span", { class: "amount" }, duration(sumOf(parts)))];
      }))) : null,
    timeTable(["run", ...epochs.map((epoch) => `epoch ${epoch.epoch}`)], [run.timings.run, ...epochs], phases.map(([name]) => name)));
}

function timeOfRuns(runs, names) {
  const longest = Math.max(...runs.map((run) => sumOf(phasesOf(run.timings.run))));
  return h("div", { class: "panel" }, h("div", { class: "share" }, runs.map((run) => {
    const phases = phasesOf(run.timings.run);
    return [h("span", null, run.name), strip(phases, longest), h("span", { class: "amount" }, duration(sumOf(phases)))];
  })), keysOf(names.map((name) => [name, 0])), timeTable(runs.map((run) => run.name), runs.map((run) => run.timings.run), names));
}

function timeTable(titles, rows, names) {
  return h("details", null, h("summary", null, "As a table"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of times" },
    h("table", null, h("caption", null, "Seconds by activity"), h("thead", null, h("tr", null, h("th", { scope: "col" }, ""), names.map((name) => h("th", { scope: "col", class: "number" }, phaseName(name))))),
      h("tbody", null, rows.map((row, i) => h("tr", null, h("th", { scope: "row" }, titles[i]), names.map((name) => h("td", { class: "number" }, isNumber(row[name]) ? row[name].toFixed(2) : "–"))))))));
}
