// Elements, icons and words. What comes from a model, a document or a file name goes into the page as text; the only
// HTML that is set as HTML is what the server made of Markdown, in `setAnswerHtml`.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  menu: "M4 6h16M4 12h16M4 18h16",
  close: "M6 6l12 12M18 6L6 18",
  add: "M12 5v14M5 12h14",
  bin: "M5 7h14M10 7V4.500h4V7M7 7l1 12.500h8L17 7",
  save: "M12 4v11M7.500 11l4.500 4.500 4.500-4.500M5 19.500h14",
  clear: "M4 6h12M4 11h8M4 16h5M14 14l6 6M20 14l-6 6",
  keys: "M3.500 7h17v10h-17zM7 10.500h.01M10.500 10.500h.01M14 10.500h.01M17.500 10.500h.01M8 13.800h8",
  system: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16z",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.500v2M12 19.500v2M2.500 12h2M19.500 12h2M5.300 5.300l1.400 1.400M17.300 17.300l1.400 1.400M18.700 5.300l-1.400 1.400M6.700 17.300l-1.400 1.400",
  dark: "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10z",
  send: "M12 19V5.500M6 11l6-6 6 6",
  copy: "M9 9h10.500v10.500H9zM5.500 15H4.500V4.500H15v1",
  look: "M4 18V13M8 18V9M12 18V4.500M16 18v-7M20 18v-3",
  again: "M19 12a7 7 0 1 1-2.300-5.200M19 4v4h-4",
};

/** Make an element. `props`: attributes; `on`: listeners by name; `text`: what it says; null and false are left out. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "text") made.textContent = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export function svg(tag, props = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function icon(name) {
  const path = svg("path", { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": 1.7,
    "stroke-linecap": "round", "stroke-linejoin": "round" });
  const half = name === "system" ? [svg("path", { d: "M12 4a8 8 0 0 0 0 16z", fill: "currentColor" })] : [];
  return svg("svg", { viewBox: "0 0 24 24", width: 20, height: 20, "aria-hidden": "true", focusable: "false" }, path, ...half);
}

/** A button with an icon, and words beside it or for who cannot see it. */
export function iconButton(name, label, onClick, { words = false, ...props } = {}) {
  return el("button", { type: "button", class: words ? "quiet" : "icon", "aria-label": words ? null : label,
    title: words ? null : label, on: { click: onClick }, ...props }, icon(name), words ? el("span", { text: label }) : null);
}

/** Put the HTML that the server made of an answer into the page: the only place that sets HTML. */
export function setAnswerHtml(target, html) {
  target.innerHTML = html;
  for (const block of target.querySelectorAll("pre")) block.tabIndex = 0;
  for (const table of target.querySelectorAll("table")) {
    const around = el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" });
    table.replaceWith(around);
    around.append(table);
  }
  for (const link of target.querySelectorAll("a[href]")) {
    const where = link.protocol === "mailto:" ? decodeURI(link.pathname) : link.host;
    if (!link.textContent.includes(where)) link.append(el("span", { class: "host", text: ` (${where})` }));
  }
}

/** A bar of the whole: shares from 0 to 1, one after another, each with a class. */
export function bar(label, parts) {
  const made = svg("svg", { class: "bar", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img",
    "aria-label": label });
  for (const [kind, from, to] of parts) {
    const x = 1000 * Math.max(0, Math.min(1, from));
    const width = Math.max(0, 1000 * Math.min(1, to) - x);
    made.append(svg("rect", { class: kind, x, y: 0, width, height: 10 }));
  }
  return made;
}

export const count = (number) => Math.round(number).toLocaleString("en");

export function counted(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

export function size(bytes) {
  if (!(bytes > 0)) return "0 MB";
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value < 10 && power > 1 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

export function duration(seconds) {
  if (!(seconds > 0)) return "a moment";
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  return `${(seconds / 3600).toFixed(1)} hours`;
}

/** Where something stands, for people: a page or a heading; how far into the text where there is none. */
export function placeOf({ place, start }, entry) {
  const label = (place ?? "").replace(/(^|, )characters \d+-\d+$/, "");
  if (label) return label.charAt(0).toUpperCase() + label.slice(1);
  return entry?.characters ? `${percent(start / entry.characters)} into the text` : "In the text";
}

/** The same, and how far into the text where a label alone, as that of a chapter, says little. */
export function preciselyOf(found, entry) {
  const where = placeOf(found, entry);
  return /^page|into the text$/i.test(where) ? where : `${where}, ${percent(found.start / entry.characters)} into the text`;
}

export const percent = (share) => {
  const value = 100 * share;
  return value > 0 && value < 1 ? "under 1 %" : `${Math.round(value)} %`;
};

export function shorten(text, most) {
  const whole = text.replace(/\s+/g, " ").trim();
  const letters = Array.from(whole);
  return letters.length <= most ? whole : `${letters.slice(0, most - 1).join("").trimEnd()}…`;
}

/** Say something to who listens instead of looking. */
export function announce(text) {
  const status = byId("status");
  if (status.textContent === text) status.textContent = "";
  status.textContent = text;
}

const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
export const scrollBehavior = () => (calm.matches ? "auto" : "smooth");
