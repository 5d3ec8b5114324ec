"use strict";

const ICONS = {
  log: ["M2 14V2", "M2 14h12", "M4 11c3 0 3-7 10-8"],
  table: ["M2 3h12v10H2z", "M2 6.5h12M2 9.8h12M6.5 3v10"],
  save: ["M8 2v8M4.8 7.2 8 10.4l3.2-3.2", "M2.5 13.5h11"],
  wide: ["M9.5 2.5h4v4M13.5 2.5 9 7", "M6.5 13.5h-4v-4M2.5 13.5 7 9"],
};
const iconButton = (icon, label, onclick, pressed) =>
  h("button", { type: "button", title: label, "aria-label": label, "aria-pressed": pressed === undefined ? null : String(pressed), onclick },
    h("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, ICONS[icon].map((d) => h("path", { d }))));

// One card with a plot of some lines. It draws when it is looked at, so that a page of hundreds opens at once.
class Chart {
  constructor(page, plot) {
    this.page = page;
    this.plot = plot;
    this.log = false;
    this.isSeen = false;
    this.isTable = false;
    this.u = null;
    this.heading = h("h3", { title: plot.title }, plot.title);
    this.buttons = ["log", "table", "save", "wide"].map((name) => iconButton(name, this.namesOf(name), () => this[name === "log" ? "toggleLog" : name](), name === "save" ? undefined : false));
    this.area = h("div", { class: "plot", role: "img", tabindex: 0, onkeydown: (event) => this.pressed(event) });
    this.tip = h("div", { class: "tip", hidden: true });
    this.legend = h("ul", { class: "legend" });
    this.note = h("p", { class: "note", hidden: true });
    this.element = h("section", { class: "chart", "aria-label": plot.title }, h("header", null, this.heading, this.buttons), this.area, this.legend, this.note);
    this.area.addEventListener("pointermove", (event) => event.pointerType !== "mouse" && this.touched(event));
    this.element.chart = this;
    page.watch.observe(this.element);
  }

  namesOf(button) {
    return { log: "Logarithmic axis", table: "Show as a table", save: "Save values as CSV", wide: "Enlarge" }[button] + `: ${this.plot.title}`;
  }

  // Lines that are drawn now.
  lines() {
    return this.plot.lines.filter((line) => !this.page.hidden.has(line.run.name));
  }

  changed(plot) {
    if (plot) this.plot = plot;
    this.isDirty = true;
    if (this.isSeen) this.draw();
  }

  seen(isSeen) {
    this.isSeen = isSeen;
    if (isSeen && this.isDirty !== false) this.draw();
  }

  draw() {
    this.isDirty = false;
    const lines = this.lines();
    this.clear();
    this.element.classList.toggle("drawn", true);
    if (this.isTable) this.drawTable(lines);
    else if (!lines.length) this.area.append(h("p", { class: "empty" }, "No run that is shown has logged this."));
    else if (lines.every((line) => line.series.count < 2)) this.drawSingle(lines);
    else this.drawCurves(lines);
    this.area.setAttribute("aria-label", this.description(lines));
    this.showLegend(lines);
  }

  clear() {
    if (this.u) this.u.destroy();
    this.u = null;
    this.area.replaceChildren();
    this.note.hidden = true;
    this.tip.hidden = true;
  }

  description(lines) {
    const told = lines.slice(0, 8).map((line) => {
      const { last, min, max } = line.series;
      const range = min ? `, smallest ${short(min[0])} at step ${short(min[1])}, largest ${short(max[0])} at step ${short(max[1])}` : "";
      return `${line.title}: last ${short(last[0])} at step ${short(last[1])}${range}`;
    });
    const more = lines.length > 8 ? `, and ${lines.length - 8} more` : "";
    return `${this.plot.title} against ${AXES[this.page.settings.axis]}. ${told.join(". ")}${more}. Arrow keys read values, plus and minus zoom; a button shows a table.`;
  }

  // What was logged once.
  drawSingle(lines) {
    const { format } = this.plot;
    this.area.style.minHeight = "0";
    if (lines.length === 1) {
      const [value, step] = lines[0].series.last;
      const label = lines[0].label === this.plot.title ? "" : `${lines[0].label}, `;
      this.area.append(h("p", { class: "single" }, format(value), h("small", null, `${label}logged once, at step ${short(step)}`)));
      return;
    }
    const numbers = lines.map((line) => line.series.last[0]).filter(isNumber);
    const most = Math.max(...numbers.map(Math.abs), 1e-300);
    this.area.append(h("div", { class: "measures" }, lines.map((line) => {
      const value = line.series.last[0];
      const width = isNumber(value) ? `${(Math.abs(value) / most) * 100}%` : "0";
      return [h("span", { title: line.title }, line.title), h("i", { style: { width, background: colourOf(line.hue) } }), h("b", null, format(value))];
    })));
  }

  drawCurves(lines) {
    const { axis, smoothing } = this.page.settings;
    const tables = [], modes = [], series = [{}], drawn = [];
    const notes = [];
    let below = 0;
    for (const line of lines) {
      const xs = placesOf(line.run, line.series, axis);
      if (!xs) { notes.push(`${line.run.name} does not know its ${AXES[axis]}.`); continue; }
      const usable = (ys) => (this.log ? ys.map((y) => { if (y !== null && y <= 0) below += 1; return y !== null && y > 0 ? y : null; }) : ys);
      const mean = line.series.mean || line.series;
      const meanXs = line.series.mean ? placesOf(line.run, line.series.mean, axis) : xs;
      const isSmooth = smoothing > 0 && line.series.count > 3;
      const colour = colourOf(line.hue);
      const isSparse = line.series.count < 40 && !isSmooth;
      const points = { show: isSparse, size: 5, fill: colour, filter: (u, i) => (isSparse ? null : standingAlone(u.data[i])) };
      const alone = line.series.y.filter((y) => y !== null).length < 2;
      const style = { stroke: colour, dash: line.dash, width: 1.7, points: alone ? { show: true, size: 8, fill: colour } : points };
      tables.push([xs, usable(line.series.y)]);
      modes.push([0, 1]);
      series.push({ ...style, ...(isSmooth ? { stroke: `${colour}4d`, width: 1, dash: [] } : {}), label: line.title });
      drawn.push({ line, xs, isRaw: true, hasSmooth: isSmooth });
      if (isSmooth) {
        const span = Math.max(meanXs[meanXs.length - 1] - meanXs[0], 1e-9);
        tables.push([meanXs, usable(smoothed(meanXs, mean.y, smoothing, span))]);
        modes.push([0, 1]);
        series.push({ ...style, width: 2.2, points: { show: false }, label: line.title });
        drawn.push({ line, xs: meanXs, isRaw: false });
      }
    }
    this.drawn = drawn;
    if (below) notes.push(`${below} values are not above 0 and have no place on a logarithmic axis.`);
    notes.push(...this.notesOfOdd(lines));
    this.say(notes);
    if (!tables.length) { this.area.append(h("p", { class: "empty" }, `No values over ${AXES[axis]}.`)); return; }
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables, modes);
    this.u = new uPlot(this.options(series), data, this.area);
    this.area.append(this.tip);
  }

  notesOfOdd(lines) {
    return lines.filter((line) => line.series.odd.length).map((line) => {
      const [[at, what]] = line.series.odd;
      const more = line.series.odd.length > 1 ? `, and ${line.series.odd.length - 1}${line.series.mean ? " or more" : ""} more` : "";
      return `${line.title}: ${what.replace("nan", "NaN").replace("inf", "infinite")} at step ${short(line.series.x[at])}${more} (▲).`;
    });
  }

  say(notes) {
    this.note.hidden = !notes.length;
    this.note.textContent = notes.slice(0, 4).join(" ") + (notes.length > 4 ? ` And ${notes.length - 4} more.` : "");
  }

  options(series) {
    const { page, plot } = this;
    const soft = css("--soft"), grid = css("--grid");
    const font = "12px system-ui, sans-serif";
    const line = { stroke: soft, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, border: { show: false } };
    const axisFormat = page.settings.axis === "time" ? duration : (x) => (Math.abs(x) >= 1e4 ? large(x) : short(x));
    const isNarrow = () => this.area.clientWidth < 480;
    return {
      width: Math.max(this.area.clientWidth, 120),
      height: this.element.classList.contains("wide") ? Math.min(480, Math.max(300, window.innerHeight * 0.6)) : isNarrow() ? 200 : 220,
      padding: [14, 16, 0, 0],
      legend: { show: false },
      series,
      scales: {
        x: { time: false, range: (u, min, max) => (page.zoom ? [page.zoom.min, page.zoom.max] : min === max ? [min - 1, max + 1] : [min, max]) },
        y: this.log ? { distr: 3, log: 10 } : { range: rangeWithRoom },
      },
      axes: [
        { ...line, size: 28, gap: 4, space: 64, values: (u, ticks) => ticks.map(axisFormat) },
        // The axis is as wide as its longest number.
        { ...line, gap: 5, space: 34, size: (u, values) => (values ? 14 + 6.6 * Math.max(...values.map((value) => (value || "").length), 2) : 40), values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : plot.format(tick))) },
      ],
      cursor: {
        y: false,
        sync: { key: "all", setSeries: false, scales: ["x", null] },
        drag: { x: true, y: false, setScale: false },
        points: { size: 7, width: 2 },
        bind: { dblclick: () => () => page.setZoom(null) },
        focus: { prox: 24 },
      },
      hooks: {
        setCursor: [(u) => this.showTip(u)],
        setSelect: [(u) => this.selected(u)],
        draw: [(u) => this.markOdd(u)],
      },
    };
  }

  selected(u) {
    const { left, width } = u.select;
    if (width < 4) return;
    const [min, max] = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.page.setZoom({ min, max });
  }

  // A triangle at the top, where a value is NaN or infinite.
  markOdd(u) {
    const size = 5 * devicePixelRatio;
    for (const { line, xs, isRaw } of this.drawn) {
      for (const [at] of isRaw ? line.series.odd : []) {
        const x = u.valToPos(xs[at], "x", true);
        if (x < u.bbox.left - 1 || x > u.bbox.left + u.bbox.width + 1) continue;
        const y = u.bbox.top - size * 0.4;
        u.ctx.fillStyle = colourOf(line.hue);
        u.ctx.beginPath();
        u.ctx.moveTo(x, y - size * 1.5);
        u.ctx.lineTo(x - size, y);
        u.ctx.lineTo(x + size, y);
        u.ctx.fill();
      }
    }
  }

  // The values at the cursor, the one that is nearest to the pointer in colour.
  showTip(u) {
    const { left, top, idx } = u.cursor;
    const isOurs = this.area.matches(":hover") || document.activeElement === this.area;
    if (!isOurs || left < 0 || idx === null || idx === undefined) { this.tip.hidden = true; return; }
    const rows = [];
    this.drawn.forEach(({ line, isRaw, hasSmooth }, i) => {
      const at = u.cursor.idxs[i + 1];
      const y = at === null || at === undefined ? null : u.data[i + 1][at];
      if (!isRaw) { if (rows.length && isNumber(y)) rows[rows.length - 1].smooth = y; return; }
      const shownY = isNumber(y) ? u.valToPos(y, "y") : 1e6;
      if (isNumber(y) || !hasSmooth) rows.push({ line, y, distance: Math.abs(shownY - top) });
    });
    const near = rows.reduce((best, row) => (best && best.distance <= row.distance ? best : row), null);
    const shown = rows.length > 12 ? rows.slice().sort((a, b) => a.distance - b.distance).slice(0, 12) : rows;
    const { format } = this.plot;
    const x = u.posToVal(left, "x");
    const place = u.data[0][idx];
    const name = this.page.settings.axis;
    const at = name === "time" ? duration(place) : `${AXES[name].replace(/s$/, "")} ${short(Number(place.toPrecision(6)))}`;
    this.tip.replaceChildren(h("div", { class: "at" }, isNumber(x) ? at : ""), ...shown.map((row) =>
      h("div", { class: row === near && rows.length > 1 ? "near" : null }, key(colourOf(row.line.hue), row.line.dash), h("span", null, row.line.title),
        h("b", null, isNumber(row.y) ? format(row.y) : "–"), isNumber(row.smooth) ? ` ~ ${format(row.smooth)}` : null)));
    this.tip.hidden = !rows.length;
    const start = u.over.offsetLeft + left;
    const isRight = start > this.area.clientWidth / 2;
    Object.assign(this.tip.style, isRight ? { left: "auto", right: `${this.area.clientWidth - start + 12}px` } : { left: `${start + 12}px`, right: "auto" });
    if (document.activeElement === this.area) this.page.say(this.tip.innerText.replace(/\n+/g, ", "));
  }

  showLegend(lines) {
    const isNeeded = !this.isTable && !lines.every((line) => line.series.count < 2) && (lines.length > 1 || lines.some((line) => line.title !== this.plot.title));
    const isMany = isNeeded && this.page.runs.length > 6;
    let entries = [];
    if (isMany) {
      // The list of runs has their colours; here stand the kinds of their lines.
      const kinds = new Map(lines.map((line) => [line.label, line.dash]));
      if (kinds.size > 1) entries = [...kinds].map(([label, dash]) => h("li", null, key(css("--soft"), dash), h("span", null, label)));
    } else if (isNeeded) {
      entries = lines.map((line) => h("li", { title: `${line.name}, ${line.run.name}` }, key(colourOf(line.hue), line.dash, line.series.count < 2), h("span", null, line.title), h("b", null, this.plot.format(line.series.last[0]))));
    }
    this.legend.replaceChildren(...entries);
    this.legend.hidden = !entries.length;
  }

  touched(event) {
    if (!this.u) return;
    const box = this.u.over.getBoundingClientRect();
    this.u.setCursor({ left: event.clientX - box.left, top: event.clientY - box.top });
  }

  pressed(event) {
    if (!this.u || event.ctrlKey || event.metaKey || event.altKey) return;
    const { min, max } = this.u.scales.x;
    const xs = this.u.data[0];
    const stride = event.shiftKey ? Math.max(10, Math.round(xs.length / 20)) : 1;
    const at = this.u.cursor.idx ?? -1;
    const moves = { ArrowRight: at + stride, ArrowLeft: (at < 0 ? xs.length : at) - stride, Home: 0, End: xs.length - 1 };
    const middle = at >= 0 ? xs[at] : (min + max) / 2;
    if (event.key in moves) {
      const to = Math.min(Math.max(moves[event.key], 0), xs.length - 1);
      const ys = this.u.data.slice(1).map((column) => column[to]).find(isNumber);
      this.u.setCursor({ left: this.u.valToPos(xs[to], "x"), top: ys === undefined ? 10 : this.u.valToPos(ys, "y") });
    } else if (event.key === "+" || event.key === "=") {
      this.page.setZoom({ min: middle - (middle - min) / 2, max: middle + (max - middle) / 2 });
    } else if (event.key === "-") {
      this.page.setZoom({ min: middle - (middle - min) * 2, max: middle + (max - middle) * 2 });
    } else if (event.key === "0" || event.key === "Escape") this.page.setZoom(null);
    else return;
    event.preventDefault();
  }

  zoomed() {
    if (this.u) this.u.setData(this.u.data, true);
  }

  resized() {
    if (this.u && Math.abs(this.u.width - this.area.clientWidth) > 1) this.u.setSize({ width: Math.max(this.area.clientWidth, 120), height: this.u.height });
  }

  press(index, isPressed) {
    this.buttons[index].setAttribute("aria-pressed", String(isPressed));
  }

  toggleLog() {
    this.setLog(!this.log);
  }

  setLog(isLog) {
    this.log = isLog;
    this.press(0, isLog);
    this.changed();
  }

  wide() {
    this.press(3, this.element.classList.toggle("wide"));
    this.changed();
  }

  table() {
    this.isTable = !this.isTable;
    this.press(1, this.isTable);
    this.changed();
  }

  // The same as a table: what is known of each line, and some of its values.
  drawTable(lines) {
    const { format } = this.plot;
    const cell = (pair) => (pair ? `${format(pair[0])} at ${short(pair[1])}` : "–");
    const summary = h("table", null, h("caption", null, "Each curve, with the steps of its values"),
      h("thead", null, h("tr", null, ["curve", "values", "last", "smallest", "largest"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, lines.map((line) => h("tr", null, h("th", { scope: "row" }, line.title), h("td", null, short(line.series.count)),
        [line.series.last, line.series.min, line.series.max].map((pair) => h("td", null, cell(pair)))))));
    const values = h("table", null, h("caption", null, "Up to 60 values of each"),
      h("thead", null, h("tr", null, ["curve", "step", "value"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, lines.slice(0, 20).map((line) => {
        const { x, y, odd } = line.series;
        const words = new Map(odd);
        const every = Math.ceil(x.length / 60);
        return x.map((step, i) => (i % every && i !== x.length - 1 ? null : h("tr", null, h("th", { scope: "row" }, line.title), h("td", null, short(step)), h("td", null, y[i] === null ? words.get(i) || "–" : format(y[i])))));
      })));
    this.area.append(h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Table of ${this.plot.title}` }, summary, values));
  }

  save() {
    const quote = (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
    const rows = this.lines().flatMap(({ run, name, series }) => series.x.map((x, i) => [quote(run.name), quote(name), x, series.t ? series.t[i] : "", series.y[i] ?? "nan"].join(",")));
    const file = new Blob([["run,metric,step,seconds,value", ...rows].join("\n")], { type: "text/csv" });
    const link = h("a", { href: URL.createObjectURL(file), download: `${this.plot.title.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

// Values between two NaNs have no line to anything: they are drawn as points. What is undefined belongs to other lines.
function standingAlone(ys) {
  const found = [];
  let before = null, last = -1;
  for (let i = 0; i <= ys.length; i += 1) {
    const y = i < ys.length ? ys[i] : null;
    if (y === undefined) continue;
    if (y === null && last >= 0 && before === null) found.push(last);
    before = last >= 0 ? ys[last] : null;
    last = y === null ? -1 : i;
  }
  return found;
}

// From the smallest to the largest value, with a little room; values that are all the same lie in the middle.
function rangeWithRoom(u, min, max) {
  if (!isNumber(min) || !isNumber(max)) return [0, 1];
  if (min === max) return [min - (Math.abs(min) * 0.1 || 1), max + (Math.abs(max) * 0.1 || 1)];
  const room = (max - min) * 0.06;
  return [min >= 0 && min - room < 0 ? 0 : min - room, max + room];
}
