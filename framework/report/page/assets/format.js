"use strict";

// Makes an element. What users wrote comes in as text only, never as markup.
function h(tag, attributes, ...children) {
  const svg = ["svg", "path", "rect", "line", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// A number as short as it stays useful: four digits, or five; steps in full.
function short(value) {
  if (typeof value === "boolean") return value ? "true" : "false";
  if (typeof value === "string") return value;
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  if (size >= 1e6) return large(value);
  return String(Number(value.toPrecision(size >= 1000 ? 5 : 4)));
}

function large(value) {
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit) return `${Number((value / limit).toPrecision(3))} ${letter}`;
  }
  return short(value);
}

function bytes(value) {
  for (const [limit, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (Math.abs(value) >= limit) return `${Number((value / limit).toPrecision(3))} ${unit}`;
  }
  return `${short(value)} B`;
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 0.0995) return `${Number((seconds * 1000).toPrecision(2))} ms`;
  if (seconds < 100) return `${Number(seconds.toPrecision(3))} s`;
  const whole = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return `${minutes} min ${whole % 60} s`;
}

const percent = (part) => (part > 0 && part < 0.001 ? "< 0.1 %" : `${Number((part * 100).toPrecision(part < 0.1 ? 2 : 3))} %`);

const when = (seconds) =>
  isNumber(seconds) ? new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : "–";

// How the values of a metric are written, by its name.
function formatterOf(name) {
  if (!name.startsWith("monitor/")) return short;
  if (/memory/.test(name)) return bytes;
  if (/\/(data_wait|transfer|step|callbacks|validation|checkpoint|other|mfu|utili[sz]ation)$/.test(name)) return percent;
  return short;
}

// Told apart with every kind of colour blindness: the colours differ in lightness too. After ten, dashes go on.
const COLOURS = {
  light: ["#1b6fc2", "#d4570b", "#067d5b", "#b03a87", "#8d6a00", "#5a43b5", "#2f9ec4", "#b8283b", "#5b6b1f", "#556070"],
  dark: ["#5aaeff", "#ff9050", "#3fd0a0", "#f08bcb", "#e8c04a", "#ad9cff", "#83d9f5", "#ff7f8d", "#b5d25a", "#aab5c5"],
};
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const theme = () => (document.documentElement.dataset.theme === "dark" ? "dark" : "light");
const colourOf = (index) => COLOURS[theme()][index % 10];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A piece of a line, as keys show it; or a dot.
function key(colour, dash, isDot) {
  if (isDot) return h("svg", { class: "key", viewBox: "0 0 22 10", "aria-hidden": "true" }, h("circle", { cx: 11, cy: 5, r: 4, fill: colour }));
  return h("svg", { class: "key", viewBox: "0 0 22 10", "aria-hidden": "true" },
    h("line", { x1: 1, x2: 21, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.6, "stroke-linecap": "round", "stroke-dasharray": (dash || []).join(" ") || null }));
}

const chip = (status) => h("span", { class: `chip ${status.state}`, title: status.text }, status.state);
