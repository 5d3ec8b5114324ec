"use strict";

const scrolled = (label, ...children) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);
const section = (id, title, note, ...children) =>
  h("section", { class: "section", id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title, note ? h("small", null, note) : null), ...children);

// Whether a smaller value of a metric is the better one, as far as its name tells; null where it does not.
function isLowerBetter(name) {
  if (/loss|error|err\b|perplexity|ppl|rmse|mse|mae|wer|cer|fid/i.test(name)) return true;
  return /acc|f1|auroc|auc|precision|recall|score|bleu|rouge|iou|dice|map\b|r2/i.test(name) ? false : null;
}

// The table of runs, which sorts by any column.
class RunsTable {
  constructor(page) {
    this.page = page;
    this.order = { column: null, isDescending: false };
    this.which = "best";
    this.element = h("div");
  }

  columns(runs) {
    const columns = [
      { title: "status", value: (run) => run.status.state, show: (run) => chip(run.status) },
      { title: "steps", value: (run) => run.last_step, isNumber: true },
      { title: "duration", value: (run) => run.seconds, show: (run) => duration(run.seconds), isNumber: true },
    ];
    const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => !/^(monitor\/|lr([-/]|$))/.test(name));
    for (const name of metrics.sort((a, b) => rank(a) - rank(b))) {
      const lower = isLowerBetter(name);
      const value = (run) => {
        const series = run.series[name];
        if (!series) return null;
        const pair = this.which === "last" || lower === null ? series.last : lower ? series.min : series.max;
        return pair ? pair[0] : null;
      };
      columns.push({ title: name, value, isNumber: true, lower });
    }
    const settings = differing(runs);
    for (const name of settings) columns.push({ title: name.replace(/^(hyperparameters|trainer)\./, ""), value: (run) => run.config[name], isSetting: true });
    return columns;
  }

  draw() {
    const { runs } = this.page;
    const columns = this.columns(runs);
    const chosen = columns.find((column) => column.title === this.order.column);
    const sorted = chosen ? runs.slice().sort((a, b) => compared(chosen.value(a), chosen.value(b), this.order.isDescending)) : runs;
    const best = new Map(columns.filter((column) => column.lower !== undefined && column.lower !== null).map((column) => {
      const values = runs.map(column.value).filter(isNumber);
      return [column, values.length > 1 ? Math[column.lower ? "min" : "max"](...values) : null];
    }));
    const head = h("tr", null, this.header({ title: "run", value: (run) => run.name }), columns.map((column) => this.header(column)));
    const rows = sorted.map((run) => h("tr", null, h("th", { scope: "row" }, h("label", null,
      h("input", { type: "checkbox", checked: !this.page.hidden.has(run.name), onchange: () => this.page.toggleRun(run.name), "aria-label": `Show ${run.name}` }), " ", key(colourOf(run.index), DASHES[Math.floor(run.index / 10) % 4]), " ", run.name)),
      columns.map((column) => {
        const value = column.value(run);
        const isBest = isNumber(value) && best.get(column) === value;
        return h("td", { class: [isNumber(value) ? "number" : "", isBest ? "best" : ""].join(" ").trim() || null, title: isBest ? "the best of these runs" : null }, column.show ? column.show(run) : short(value));
      })));
    const choice = h("label", null, "Of each metric ", h("select", { onchange: (event) => { this.which = event.target.value; this.draw(); } },
      [["best", "the best value"], ["last", "the last value"]].map(([value, text]) => h("option", { value, selected: value === this.which }, text))));
    this.element.replaceChildren(h("div", { class: "controls" }, choice), h("div", { class: "panel" }, scrolled("Table of runs", h("table", null, h("thead", null, head), h("tbody", null, rows)))));
  }

  header(column) {
    const isChosen = this.order.column === column.title;
    const direction = this.order.isDescending ? "descending" : "ascending";
    const press = () => {
      this.order = { column: column.title, isDescending: isChosen ? !this.order.isDescending : column.lower === false };
      this.draw();
      [...this.element.querySelectorAll("th button")].find((button) => button.dataset.title === column.title)?.focus();
    };
    return h("th", { scope: "col", class: column.isNumber ? "number" : null, "aria-sort": isChosen ? direction : null },
      h("button", { type: "button", "data-title": column.title, onclick: press }, column.title, isChosen ? (this.order.isDescending ? " ↓" : " ↑") : ""));
  }
}

// Numbers before texts, and what is missing last, either way.
function compared(a, b, isDescending) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const both = isNumber(a) && isNumber(b);
  const order = both ? a - b : isNumber(a) !== isNumber(b) ? isNumber(b) - isNumber(a) : String(a).localeCompare(String(b), "en", { numeric: true });
  return isDescending ? -order : order;
}

// Names of settings that are not the same in all runs.
function differing(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  return names.filter((name) => new Set(runs.map((run) => JSON.stringify(run.config[name] ?? null))).size > 1);
}

// As Python writes it; 0.1 + 0.2 without its last digits.
const setting = (value) => ({ true: "True", false: "False", null: "None" }[String(value)] ?? String(isNumber(value) ? Number(value.toPrecision(12)) : value));

function configSection(runs) {
  // What the user has chosen comes first.
  const isChosen = (name) => name.startsWith("hyperparameters");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort((a, b) => isChosen(b) - isChosen(a));
  if (!names.length) return null;
  const own = section("config", "Configuration", runs.length > 1 ? "what differs is marked" : `${names.length} settings`);
  const other = new Set(runs.length > 1 ? differing(runs) : []);
  const body = h("tbody");
  const fill = (word, onlyOther) => {
    const wanted = names.filter((name) => (!onlyOther || other.has(name)) && matches(name + runs.map((run) => run.config[name]).join(" "), word));
    body.replaceChildren(...wanted.map((name) => h("tr", null, h("th", { scope: "row", class: "mono wrap" }, name),
      runs.map((run) => h("td", { class: `mono wrap${other.has(name) ? " differs" : ""}` }, name in run.config ? setting(run.config[name]) : "–")))));
    if (!wanted.length) body.replaceChildren(h("tr", null, h("td", { colspan: runs.length + 1 }, onlyOther && !other.size ? "All runs have the same settings." : "No setting has this in it.")));
  };
  const search = h("input", { class: "field", type: "search", placeholder: "Find a setting", "aria-label": "Find a setting", oninput: () => fill(search.value, only && only.checked) });
  const only = runs.length > 1 ? h("input", { type: "checkbox", checked: true, onchange: () => fill(search.value, only.checked) }) : null;
  fill("", Boolean(only));
  own.append(h("div", { class: "controls" }, search, only ? h("label", null, only, "differences only") : null),
    h("div", { class: "panel" }, scrolled("Configuration", h("table", null, runs.length > 1 ? h("thead", null, h("tr", null, h("th", { scope: "col" }, "setting"), runs.map((run) => h("th", { scope: "col" }, run.name)))) : null, body))));
  return own;
}

const matches = (text, word) => {
  try { return new RegExp(word, "i").test(text); } catch { return text.toLowerCase().includes(word.toLowerCase()); }
};

function checkpointsSection(runs) {
  const all = runs.flatMap((run) => run.checkpoints.map((checkpoint) => ({ ...checkpoint, run })));
  if (!all.length) return null;
  const scores = [...new Set(all.flatMap((one) => Object.keys(one.scores)))].slice(0, 8);
  const best = new Map(scores.map((name) => {
    const lower = isLowerBetter(name);
    const values = all.map((one) => one.scores[name]).filter(isNumber);
    return [name, lower === null || values.length < 2 ? null : Math[lower ? "min" : "max"](...values)];
  }));
  const line = h("pre", { tabindex: 0, "aria-label": "How to load it" });
  const choose = (one) => { line.textContent = `model = ${one.run.model_class || "Model"}.load_from_checkpoint(${JSON.stringify(one.path)})\ntrainer.fit(model, ckpt_path=${JSON.stringify(one.path)})  # to go on training from it`; };
  const copy = h("button", { class: "button", type: "button", onclick: () => copyText(line, copy) }, "Copy");
  const kept = all.filter((one) => !one.is_removed);
  const first = kept[kept.length - 1] || all[all.length - 1];
  const rows = all.slice().reverse().map((one) => h("tr", null,
    h("td", null, h("input", { type: "radio", name: "checkpoint", checked: one === first, disabled: one.is_removed, "aria-label": `How to load ${one.path}`, onchange: () => choose(one) })),
    runs.length > 1 ? h("td", null, one.run.name) : null,
    h("td", { class: "mono wrap", title: one.path }, one.path.split("/").slice(-1)[0], one.is_removed ? h("small", null, " (removed since)") : null), h("td", { class: "number" }, short(one.step)), h("td", { class: "number" }, short(one.epoch)),
    scores.map((name) => h("td", { class: `number${isNumber(one.scores[name]) && best.get(name) === one.scores[name] ? " best" : ""}` }, short(one.scores[name]))), h("td", null, when(one.time))));
  choose(first);
  const titles = ["", ...(runs.length > 1 ? ["run"] : []), "checkpoint", "step", "epoch", ...scores, "saved"];
  return section("checkpoints", "Checkpoints", `${all.length}`, h("div", { class: "panel" },
    scrolled("Checkpoints", h("table", null, h("thead", null, h("tr", null, titles.map((title) => (title ? h("th", { scope: "col", class: title === "step" || title === "epoch" || scores.includes(title) ? "number" : null }, title) : h("td", null, ""))))), h("tbody", null, rows))),
    h("div", { class: "load" }, line, copy)));
}

async function copyText(from, button) {
  try {
    await navigator.clipboard.writeText(from.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(from);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function environmentSection(runs) {
  const told = runs.filter((run) => Object.keys(run.environment).length || run.model);
  if (!told.length) return null;
  return section("environment", "Environment", "where and from what it ran", told.map((run) => {
    const blocks = Object.entries(run.environment).map(([name, facts]) => h("details", { open: name === "command" || name === "git" || name === "hardware" },
      h("summary", null, h("b", null, sentence(name)), " ", h("small", null, name === "packages" ? `${Object.keys(facts).length}` : "")),
      h("dl", { class: "facts" }, Object.entries(facts).map(([fact, value]) => [h("dt", null, fact || name), h("dd", { class: "mono" }, /memory/.test(fact) && isNumber(value) ? bytes(value) : setting(value))]))));
    const model = run.model ? h("details", null, h("summary", null, h("b", null, "Model")), h("pre", { tabindex: 0 }, run.model)) : null;
    const content = h("div", { class: "panel" }, blocks, model);
    return runs.length > 1 ? h("details", null, h("summary", null, run.name), content) : content;
  }));
}

function warningsSection(runs) {
  // The same warning of several runs stands once.
  const told = new Map();
  for (const run of runs) for (const text of run.warnings) told.set(text, [...(told.get(text) || []), run.name]);
  const restarted = runs.filter((run) => run.attempts.length > 1);
  if (!told.size && !restarted.length) return null;
  const whose = (names) => (runs.length === 1 ? "" : names.length > 3 ? `${names.length} runs` : [...new Set(names)].join(", "));
  const attempts = (run) => run.attempts.map((attempt) => `from step ${short(attempt.first_step ?? 0)}${isNumber(attempt.started) ? ` (${when(attempt.started)})` : ""}`).join(", ");
  return section("warnings", "Warnings and restarts", "", h("div", { class: "panel" },
    told.size ? h("ul", { class: "told" }, [...told].map(([text, names]) => h("li", { class: "wrap" }, text, " ", h("small", null, whose(names))))) : null,
    restarted.map((run) => h("p", null, `${runs.length > 1 ? run.name : "This run"} was started ${run.attempts.length} times: ${attempts(run)}.`))));
}
