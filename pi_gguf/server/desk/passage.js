// A passage of the document, with what is around it.

import { documentPath, getJson } from "./api.js";
import { announce, bar, byId, el, iconButton, percent, placeOf } from "./dom.js";

const AROUND = 1200;
const MORE = 4000;

const KINDS = { exact: "word for word", near: "near the words of the document", looked: "looked at" };

let opener = null;

export const isPassageOpen = () => !byId("passage").hidden;

export function closePassage() {
  const panel = byId("passage");
  if (panel.hidden) return;
  panel.hidden = true;
  byId("desk").classList.remove("with-passage");
  for (const one of document.querySelectorAll("[data-open]")) delete one.dataset.open;
  opener?.isConnected && opener.focus({ preventScroll: true });
  opener = null;
}

/**
 * Open a passage.
 *
 * `passage`: start and end (characters of the document, code points), place, kind (exact, near, looked), said (the
 * answer's words) and share; `entry`: the document; `from`: the element that gets the focus back.
 */
export async function openPassage(passage, entry, from) {
  const panel = byId("passage");
  if (panel.hidden) opener = null;
  for (const one of document.querySelectorAll("[data-open]")) delete one.dataset.open;
  opener = from ?? opener;
  if (from) from.dataset.open = "";
  const text = el("div", { class: "text", tabindex: 0, role: "group", "aria-label": "Text of the document" });
  const found = passage.kind === "looked" ? `${percent(passage.share)} of its attention` : KINDS[passage.kind];
  panel.replaceChildren(
    el("header", {},
      el("div", {}, el("h2", { id: "passage-name", text: placeOf(passage, entry) }),
        el("p", { class: `found ${passage.kind}`, text: found })),
      iconButton("close", "Close the passage", closePassage)),
    bar(`It stands at ${percent(passage.start / entry.characters)} of the document`, [
      ["room", 0, 1],
      ["here", Math.min(0.994, passage.start / entry.characters), Math.max(passage.end / entry.characters, passage.start / entry.characters + 0.006)],
    ]),
    ...(passage.kind === "near" && passage.said ? [el("p", { class: "said" }, "The answer says: ", el("q", { text: passage.said }))] : []),
    text,
  );
  panel.hidden = false;
  byId("desk").classList.add("with-passage");
  panel.scrollTop = 0;
  panel.focus({ preventScroll: true });
  const view = new Text(text, passage, entry);
  await view.load(Math.max(0, passage.start - AROUND), Math.min(entry.characters, passage.end + AROUND));
  announce(`Passage: ${placeOf(passage, entry)}`);
}

const LONG_LINE = 45;

/** Let lines run on that were broken at a width; each letter stays one letter. */
function runOn(letters) {
  const shown = letters.slice();
  let begin = 0;
  for (let i = 0; i < letters.length; i++) {
    if (letters[i] !== "\n") continue;
    const next = letters[i + 1];
    if (i - begin >= LONG_LINE && next !== undefined && /[^\s*+>#|-]/.test(next)) shown[i] = " ";
    begin = i + 1;
  }
  return shown;
}

class Text {
  constructor(element, passage, entry) {
    this.element = element;
    this.passage = passage;
    this.entry = entry;
    this.letters = [];
    this.start = this.end = 0;
  }

  async get(start, end) {
    const given = await getJson(documentPath(this.entry.id, `/text?start=${start}&end=${end}`));
    return { start: given.start, letters: Array.from(given.text) };
  }

  async load(start, end) {
    try {
      const given = await this.get(start, end);
      this.letters = given.letters;
      this.start = given.start;
      this.draw();
      this.element.querySelector("mark")?.scrollIntoView({ block: "center", behavior: "auto" });
    } catch (error) {
      this.element.replaceChildren(el("p", { class: "wrong", text: `The text could not be had: ${error.message}` }));
    }
  }

  async more(before) {
    const begin = this.start;
    const end = begin + this.letters.length;
    const height = this.element.scrollHeight - this.element.scrollTop;
    try {
      const given = before ? await this.get(Math.max(0, begin - MORE), begin) : await this.get(end, Math.min(this.entry.characters, end + MORE));
      this.letters = before ? [...given.letters, ...this.letters] : [...this.letters, ...given.letters];
      this.start = before ? given.start : begin;
      this.draw();
      if (before) this.element.scrollTop = this.element.scrollHeight - height;
    } catch (error) {
      announce(`The text could not be had: ${error.message}`);
    }
  }

  draw() {
    const from = Math.max(0, this.passage.start - this.start);
    const to = Math.max(from, this.passage.end - this.start);
    const shown = runOn(this.letters);
    const part = (start, end) => shown.slice(start, end).join("");
    const end = this.start + this.letters.length;
    const more = (text, before) => el("button", { type: "button", class: "quiet more", text, on: { click: () => this.more(before) } });
    this.element.replaceChildren(
      ...(this.start > 0 ? [more("Text before it", true)] : []),
      el("p", { dir: "auto" }, part(0, from), el("mark", { class: this.passage.kind, text: part(from, to) }), part(to)),
      ...(end < this.entry.characters ? [more("Text after it", false)] : []),
    );
  }
}

