"use strict";

// Logged images, texts, tables, histograms and sounds; a slider chooses the step.
function mediaSection(runs) {
  const all = runs.flatMap((run) => run.media.map((entry) => ({ ...entry, run })));
  if (!all.length) return null;
  all.sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : a.run.index - b.run.index));
  return section("media", "Images, texts and tables", "", h("div", { class: "gallery" }, all.map((entry) => mediaItem(entry, runs.length > 1))));
}

function mediaItem(entry, isOneOfMany) {
  const title = entry.name + (isOneOfMany ? ` · ${entry.run.name}` : "");
  const body = h("div");
  const label = h("output");
  const show = (index) => {
    const [step, items] = entry.steps[index];
    label.textContent = `step ${short(step)}`;
    body.replaceChildren(h("div", { class: "pictures" }, items.map((item, i) => mediaValue(entry.kind, item, `${title}, step ${step}${items.length > 1 ? `, number ${i + 1}` : ""}`))));
  };
  const slider = entry.steps.length > 1 ? h("input", { type: "range", min: 0, max: entry.steps.length - 1, value: entry.steps.length - 1, "aria-label": `Step of ${title}`, oninput: () => show(Number(slider.value)) }) : null;
  if (entry.steps.length) show(entry.steps.length - 1);
  else body.append(h("p", { class: "empty" }, "Too large for this page."));
  const left = entry.left_out ? h("p", { class: "note" }, `${entry.left_out} further steps lie in the run's folder.`) : null;
  return h("article", { class: "panel item" }, h("header", null, h("h3", null, title), slider, label), body, left);
}

function mediaValue(kind, item, title) {
  if (item.error) return h("p", { class: "note" }, item.error);
  const caption = item.caption ? h("figcaption", null, item.caption) : null;
  if (kind === "image") {
    const image = h("img", { src: item.source, alt: item.caption || title, onload: () => image.classList.toggle("small", image.naturalWidth < 100) });
    return h("figure", null, image, caption);
  }
  if (kind === "audio") return h("figure", null, h("audio", { controls: true, src: item.source, "aria-label": title }), caption);
  if (kind === "table" && item.columns) {
    const rest = item.count > item.rows.length ? h("p", { class: "note" }, `${item.count - item.rows.length} further rows are left out.`) : null;
    return h("div", { style: { minWidth: "0", width: "100%" } }, scrolled(title, h("table", null, h("thead", null, h("tr", null, item.columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, item.rows.map((row) => h("tr", null, row.map((cell) => h("td", null, cell))))))), rest);
  }
  if (kind === "histogram" && item.counts) return histogram(item, title);
  return h("pre", { tabindex: 0 }, item.text);
}

function histogram({ counts, edges }, title) {
  const most = Math.max(...counts, 1e-300);
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const span = high - low || 1;
  const told = `${title}: ${short(counts.reduce((a, b) => a + b, 0))} values from ${short(low)} to ${short(high)}`;
  return h("figure", { style: { width: "100%" } }, h("svg", { viewBox: "0 0 300 100", role: "img", "aria-label": told, preserveAspectRatio: "none", style: { width: "100%", height: "120px" } },
    counts.map((count, i) => h("rect", { x: ((edges[i] - low) / span) * 300, width: Math.max(((edges[i + 1] - edges[i]) / span) * 300 - 0.4, 0.3), y: 100 - (count / most) * 98, height: (count / most) * 98, fill: colourOf(0) }))),
    h("figcaption", null, `from ${short(low)} to ${short(high)}, ${short(counts.reduce((a, b) => a + b, 0))} values`));
}
