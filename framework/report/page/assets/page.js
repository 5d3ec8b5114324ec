"use strict";

class Page {
  constructor(data) {
    this.settings = { axis: "step", smoothing: 0, log: false, paired: true, search: "", ...this.remembered() };
    this.settings.search = "";
    this.hidden = new Set();
    this.zoom = null;
    this.charts = new Map();
    this.main = document.getElementById("main");
    this.said = document.getElementById("said");
    // Within a screen's distance, so that scrolling shows curves, not empty cards.
    this.watch = new IntersectionObserver((entries) => entries.forEach((entry) => entry.target.chart.seen(entry.isIntersecting)), { rootMargin: "300px" });
    this.table = new RunsTable(this);
    this.take(data);
    this.drawAll();
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resized())).observe(this.main);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { setTheme(); this.recolour(); });
  }

  take(data) {
    this.data = data;
    this.runs = data.runs;
    this.runs.forEach((run, index) => {
      run.index = index;
      run.model_class = Object.fromEntries(run.facts).model;
    });
  }

  remembered() {
    try { return JSON.parse(localStorage.getItem("loopwright") || "{}"); } catch { return {}; }
  }

  set(name, value) {
    this.settings[name] = value;
    try { localStorage.setItem("loopwright", JSON.stringify(this.settings)); } catch { /* no storage: as the page is */ }
  }

  say(text) {
    clearTimeout(this.saying);
    this.saying = setTimeout(() => { this.said.textContent = text; }, 150);
  }

  drawAll() {
    const { runs } = this;
    const isOne = runs.length === 1;
    const parts = [isOne ? heroOfRun(runs[0]) : heroOfRuns(this.data), ...runs.map((run) => failureNotice(run, isOne)), isOne ? tilesOf(runs[0]) : null];
    if (!isOne) {
      this.table.draw();
      parts.push(section("runs", "Runs", `${runs.length}`, this.table.element));
    }
    this.curves = this.curvesSection();
    parts.push(this.curves, timeSection(runs), mediaSection(runs), checkpointsSection(runs), configSection(runs), environmentSection(runs), warningsSection(runs));
    const made = new Date(this.data.made * 1000).toLocaleString();
    const folders = isOne ? `Read from ${runs[0].folder}. ` : "";
    parts.push(h("footer", null, `${folders}Made ${made} by Loopwright. Curves are drawn with uPlot (MIT).`));
    this.main.replaceChildren(...parts.filter(Boolean));
    this.drawBar();
  }

  drawBar() {
    const links = [...this.main.querySelectorAll(".section")].map((one) => h("a", { href: `#${one.id}` }, one.querySelector("h2").firstChild.textContent));
    const toggle = h("button", { class: "button quiet", type: "button", "aria-label": "Change between light and dark", title: "Light or dark", onclick: () => { setTheme(theme() === "dark" ? "light" : "dark"); this.recolour(); } },
      h("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, h("circle", { cx: 8, cy: 8, r: 6.2, fill: "none", stroke: "currentColor", "stroke-width": 1.6 }), h("path", { d: "M8 2a6 6 0 0 1 0 12z", fill: "currentColor" })));
    const mark = h("a", { class: "mark", href: "#main", style: { color: "inherit", textDecoration: "none" } }, h("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" }, h("rect", { width: 32, height: 32, rx: 7, fill: "#175fa8" }), h("path", { d: "M6 23c5 0 5-14 10-14s4 8 10 8", fill: "none", stroke: "white", "stroke-width": 3, "stroke-linecap": "round" })), "Loopwright");
    document.getElementById("top").replaceChildren(h("header", { class: "bar" }, h("div", null, mark, h("nav", { "aria-label": "Sections" }, links), this.data.live ? h("span", { class: "chip running", id: "live" }, "live") : null, toggle)));
  }

  recolour() {
    if (this.runs.length > 1) this.table.draw();
    this.redraw();
    document.getElementById("time")?.replaceWith(timeSection(this.runs));
    document.getElementById("media")?.replaceWith(mediaSection(this.runs));
    this.drawRuns();
  }

  curvesSection() {
    this.groups = h("div");
    this.runList = h("div", { class: "runs", role: "group", "aria-label": "Runs that are shown" });
    const own = section("curves", "Curves", "drag to zoom, double-click to see all", this.controls(), this.runList, this.groups);
    this.drawRuns();
    this.drawGroups();
    return own;
  }

  controls() {
    const axes = [...new Set(this.runs.flatMap(axesOf))];
    if (!axes.includes(this.settings.axis)) this.settings.axis = "step";
    const axis = h("select", { onchange: () => { this.set("axis", axis.value); this.setZoom(null, false); this.redraw(); } }, axes.map((name) => h("option", { value: name, selected: name === this.settings.axis }, AXES[name])));
    const amount = h("output", null, this.settings.smoothing.toFixed(2));
    const smoothing = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: this.settings.smoothing, oninput: () => { amount.textContent = Number(smoothing.value).toFixed(2); this.set("smoothing", Number(smoothing.value)); this.later(); } });
    const log = this.switch("log axis", this.settings.log, (isOn) => { this.set("log", isOn); this.charts.forEach((chart) => chart.setLog(isOn)); });
    const paired = this.switch("train with val", this.settings.paired, (isOn) => { this.set("paired", isOn); this.drawGroups(); });
    paired.title = "Draw train_loss and val_loss into one plot";
    const search = h("input", { class: "field", type: "search", placeholder: "Find a metric", "aria-label": "Find a metric, by a regular expression", oninput: () => { this.settings.search = search.value; this.drawGroups(); } });
    this.all = h("button", { class: "button", type: "button", hidden: true, onclick: () => this.setZoom(null) }, "Show all");
    return h("div", { class: "controls" }, search, h("label", null, "over ", axis), h("label", null, "smoothing ", smoothing, amount), log, paired, this.all);
  }

  switch(text, isOn, changed) {
    const button = h("button", { class: "button", type: "button", "aria-pressed": String(isOn), onclick: () => { isOn = !isOn; button.setAttribute("aria-pressed", String(isOn)); changed(isOn); } }, text);
    return button;
  }

  drawRuns() {
    this.runList.hidden = this.runs.length < 2;
    this.runList.replaceChildren(...(this.runs.length < 2 ? [] : this.runs.map((run) => h("button", { class: "run", type: "button", "aria-pressed": String(!this.hidden.has(run.name)), title: run.folder, onclick: () => this.toggleRun(run.name) },
      key(colourOf(run.index), DASHES[Math.floor(run.index / 10) % 4]), h("span", null, run.name)))));
  }

  drawGroups() {
    const opened = new Map([...this.groups.children].map((group) => [group.dataset.title, group.open]));
    const before = this.charts;
    this.charts = new Map();
    const wanted = (plot) => matches(`${plot.title} ${plot.lines.map((line) => line.name).join(" ")}`, this.settings.search);
    const groups = plotsOf(this.runs, this.settings.paired).map((group) => {
      const plots = group.plots.filter(wanted);
      if (!plots.length) return null;
      const cards = plots.map((plot) => {
        const name = `${group.title}\n${plot.title}`;
        const chart = before.get(name) || new Chart(this, plot);
        before.delete(name);
        this.charts.set(name, chart);
        if (this.settings.log && !chart.log) chart.setLog(true);
        chart.changed(plot);
        return chart.element;
      });
      return h("details", { class: "group", open: opened.get(group.title) ?? true, "data-title": group.title }, h("summary", null, group.title, " ", h("small", null, String(plots.length))), h("div", { class: "charts" }, cards));
    });
    before.forEach((chart) => { this.watch.unobserve(chart.element); chart.clear(); });
    this.groups.replaceChildren(...groups.filter(Boolean));
    if (!this.groups.children.length) {
      const isEmpty = this.runs.every((run) => !Object.keys(run.series).length);
      this.groups.append(isEmpty ? emptyNotice(this.runs) : h("div", { class: "panel empty" }, h("b", null, "No metric has this in its name"), "Clear the search to see all."));
    }
  }

  later() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.redraw());
  }

  redraw() {
    this.charts.forEach((chart) => chart.changed());
  }

  setZoom(zoom, isShown = true) {
    this.zoom = zoom;
    this.all.hidden = !zoom;
    if (isShown) this.charts.forEach((chart) => chart.zoomed());
  }

  toggleRun(name) {
    if (!this.hidden.delete(name)) this.hidden.add(name);
    const before = document.activeElement?.getAttribute("title");
    this.drawRuns();
    this.table.draw();
    this.redraw();
    [...this.runList.children].find((button) => before && button.title === before)?.focus();
  }

  // Newer values of runs that go on. What was chosen stays.
  refresh(data) {
    const place = window.scrollY;
    this.take(data);
    const isSameCurves = this.curves;
    const next = document.createElement("main");
    this.drawGroups();
    this.drawRuns();
    const fresh = { time: timeSection, media: mediaSection, checkpoints: checkpointsSection, config: configSection, environment: environmentSection, warnings: warningsSection };
    let last = isSameCurves;
    for (const [id, make] of Object.entries(fresh)) {
      const old = document.getElementById(id);
      // Somebody may be at work in it.
      if (old && (old.contains(document.activeElement) || id === "config" || id === "environment")) { last = old; continue; }
      const made = make(this.runs);
      if (old) old.remove();
      if (made) { last.after(made); last = made; }
    }
    next.remove();
    const head = this.runs.length === 1 ? [heroOfRun(this.runs[0]), failureNotice(this.runs[0], true), tilesOf(this.runs[0])] : [heroOfRuns(data), ...this.runs.map((run) => failureNotice(run, false))];
    this.main.querySelectorAll(":scope > .hero, :scope > .notice, :scope > .tiles").forEach((one) => one.remove());
    this.main.prepend(...head.filter(Boolean));
    if (this.runs.length > 1) this.table.draw();
    this.drawBar();
    window.scrollTo(0, place);
  }
}

function heroOfRun(run) {
  const parts = [run.started ? `Started ${when(run.started)}` : null, run.status.text || null].filter(Boolean);
  const facts = run.facts.map(([name, value]) => ({
    parameters: () => `${large(value)} parameters`,
    FLOPs: () => `${large(value)} FLOPs a sample`,
    batch: () => `batch of ${short(value)}`,
  }[name] || (() => short(value)))());
  return h("div", { class: "hero" }, h("h1", null, run.name), chip(run.status), facts.length ? h("p", { class: "facts-line" }, facts.join(" · ")) : null, h("p", null, parts.join(" · ")));
}

function heroOfRuns(data) {
  const counts = new Map();
  for (const run of data.runs) counts.set(run.status.state, (counts.get(run.status.state) || 0) + 1);
  return h("div", { class: "hero" }, h("h1", null, data.title), h("p", null, [...counts].map(([state, count]) => `${count} ${state}`).join(", ")));
}

function failureNotice(run, isOne) {
  const { failure, status } = run;
  if (!["failed", "killed"].includes(status.state)) return null;
  if (!failure && !isOne && status.state !== "failed") return null;
  const title = (isOne ? "" : `${run.name}: `) + (status.state === "killed" ? `stopped without a word after step ${short(run.last_step)}` : "failed");
  const ranks = (failure ? failure.ranks : []).map((rank) => [rank.message || rank.trace ? h("details", { open: isOne && failure.ranks[0] === rank },
    h("summary", null, `Rank ${rank.rank} ${rank.kind}${rank.place ? `, ${rank.place}` : ""}`), h("pre", { tabindex: 0, "aria-label": "Traceback" }, rank.trace || rank.message)) : null]);
  return h("section", { class: "notice bad", "aria-label": "How it failed" }, h("h2", null, title.charAt(0).toUpperCase() + title.slice(1)), h("p", null, (failure && failure.summary) || status.text), ranks);
}

function tilesOf(run) {
  const tiles = [];
  const add = (name, value, note) => tiles.push(h("div", { class: "tile" }, h("dt", { title: name }, name), h("dd", null, value, note ? h("small", null, note) : null)));
  const names = Object.keys(run.series).filter((name) => !/^(monitor\/|lr([-/]|$)|epoch$)/.test(name) && isLowerBetter(name) !== null);
  const parted = names.map((name) => ({ name, ...nameParts(name) }));
  const chosen = [...parted.filter(({ split }) => split === "test"), ...parted.filter(({ split, kind }) => split === "val" && kind !== "step"), ...parted.filter(({ split, kind }) => split !== "val" && split !== "test" && kind !== "step")].slice(0, 4);
  for (const { name } of chosen) {
    const series = run.series[name];
    const lower = isLowerBetter(name);
    const best = lower ? series.min : series.max;
    if (series.count === 1) add(name, short(series.last[0]), `at step ${short(series.last[1])}`);
    else if (best) add(`${lower ? "Lowest" : "Highest"} ${name}`, short(best[0]), `at step ${short(best[1])}; last ${short(series.last[0])}`);
    else add(name, short(series.last[0]), "never finite");
  }
  if (run.last_step || tiles.length) {
    const epochs = run.epoch_ends.length ? `in ${short(run.epoch_ends[run.epoch_ends.length - 1][0] + 1)} epochs` : "";
    add("Steps", short(run.last_step), epochs.replace(/\b1 epochs/, "1 epoch"));
  }
  if (isNumber(run.seconds)) add("Duration", duration(run.seconds), run.last_step && run.seconds ? `${short(run.last_step / run.seconds)} steps a second` : "");
  return tiles.length ? h("dl", { class: "tiles" }, tiles) : null;
}

function emptyNotice(runs) {
  const [run] = runs;
  const texts = {
    running: "Values appear once the first rows are written, after log_every_n_steps steps.",
    failed: "The run ended before its first row was written. What is known of the failure stands above.",
    killed: "The run was stopped before its first row was written.",
  };
  const advice = "Log values with self.log(\"loss\", loss) in training_step.";
  return h("div", { class: "panel empty" }, h("b", null, "No metrics were logged"), (runs.length === 1 && texts[run.status.state]) || advice);
}

function setTheme(chosen) {
  let name = chosen;
  try {
    if (chosen) localStorage.setItem("loopwright-theme", chosen);
    else name = localStorage.getItem("loopwright-theme");
  } catch { /* no storage: as the system has it */ }
  document.documentElement.dataset.theme = name || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

// A page that is served asks for newer values. It stops when the server has.
async function follow(page) {
  let wait = 2000;
  let failures = 0;
  let version = "";
  for (;;) {
    await new Promise((done) => setTimeout(done, wait));
    try {
      const answer = await fetch(`data.json?since=${encodeURIComponent(version)}`);
      failures = 0;
      if (answer.status === 200) {
        version = answer.headers.get("ETag") || "";
        page.refresh({ ...(await answer.json()), live: true });
      }
      wait = Number(answer.headers.get("X-Next")) * 1000 || 2000;
    } catch {
      failures += 1;
      const sign = document.getElementById("live");
      if (failures > 2 && sign) { sign.className = "chip interrupted"; sign.textContent = "no longer live"; return; }
    }
  }
}

setTheme();
const page = new Page(JSON.parse(document.getElementById("data").textContent));
document.documentElement.dataset.ready = "true";
if (page.data.live) follow(page);
