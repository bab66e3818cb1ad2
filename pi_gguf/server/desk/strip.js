// Where the model looked: the whole document as a strip, a column for each passage, a tick for each quotation.

import { count, el, percent, preciselyOf, svg } from "./dom.js";

const FIRST = 3;

/**
 * Draw it. `passages`: start, end, place, share, in the document's order; `open(passage, from)` is called for the one
 * that is chosen. The strip is a slider: one stop of the keyboard, arrows go through the passages.
 */
export function lookedStrip(passages, quotes, entry, open) {
  const { characters } = entry;
  const most = Math.max(...passages.map((one) => one.share), 1e-9);
  const x = (character) => (1000 * character) / characters;
  const columns = passages.map((one) => {
    const height = 100 * Math.sqrt(one.share / most);
    return svg("rect", { class: "column", x: x(one.start), width: Math.max(1, x(one.end) - x(one.start)), y: 100 - height, height });
  });
  const ticks = quotes.filter((one) => one.found !== "none").map((one) =>
    svg("rect", { class: `tick ${one.found}`, x: Math.min(996, x(one.start)), width: 4, y: 106, height: 14 }));
  const cursor = svg("rect", { class: "cursor", x: 0, width: 0, y: 0, height: 100 });
  const drawing = svg("svg", { viewBox: "0 0 1000 120", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "ground", x: 0, width: 1000, y: 98, height: 2 }), cursor, ...columns, ...ticks);
  const readout = el("p", { class: "readout", "aria-hidden": "true" });
  const slider = el("div", { class: "strip", role: "slider", tabindex: 0, "aria-label": "Passages of the document, by where it looked",
    "aria-valuemin": 1, "aria-valuemax": passages.length }, drawing);
  const best = [...passages.keys()].sort((a, b) => passages[b].share - passages[a].share);
  let at = best[0];
  const describe = (one) => `${percent(one.share)} of its attention: ${preciselyOf(one, entry)}`;

  function point(index) {
    at = Math.max(0, Math.min(passages.length - 1, index));
    const one = passages[at];
    cursor.setAttribute("x", x(one.start) - 4);
    cursor.setAttribute("width", x(one.end) - x(one.start) + 8);
    readout.textContent = describe(one);
    slider.setAttribute("aria-valuenow", at + 1);
    slider.setAttribute("aria-valuetext", `${describe(one)}, passage ${count(at + 1)} of ${count(passages.length)}`);
  }

  function under(event) {
    const { left, width } = slider.getBoundingClientRect();
    const character = ((event.clientX - left) / width) * characters;
    const after = passages.findIndex((one) => one.end > character);
    return after < 0 ? passages.length - 1 : after;
  }

  const show = (index, from) => open({ ...passages[index], kind: "looked" }, from);
  const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
  slider.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") show(at, slider);
    else if (event.key in steps) point(at + Math.max(-1e9, Math.min(1e9, steps[event.key])));
    else return;
    event.preventDefault();
  });
  slider.addEventListener("pointermove", (event) => point(under(event)));
  slider.addEventListener("click", (event) => {
    point(under(event));
    show(at, slider);
  });
  point(at);

  const list = el("ol", { class: "first" }, ...best.slice(0, FIRST).filter((index) => passages[index].share > 0).map((index) =>
    el("li", {}, el("button", { type: "button", class: "quiet", text: describe(passages[index]),
      on: { click: (event) => show(index, event.currentTarget), focus: () => point(index) } }))));
  return el("section", { class: "looked", "aria-label": "Where it looked" },
    el("h3", { text: "Where it looked" }), slider,
    el("p", { class: "ends", "aria-hidden": "true" }, el("span", { text: "begin" }), readout, el("span", { text: "end" })), list);
}
