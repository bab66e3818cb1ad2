// A question and its answer on the page: while it is waited for, while it is written, and after.

import { documentPath, getJson } from "./api.js";
import { announce, bar, count, duration, el, iconButton, setAnswerHtml } from "./dom.js";
import { openPassage } from "./passage.js";
import { markQuotes, quoteList } from "./quotes.js";
import { quotesOf } from "./store.js";
import { lookedStrip } from "./strip.js";

const BETWEEN = 150;
const LEAST_TOLD = 200;

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

/** Has the server make HTML of an answer while it grows: one request at a time, the newest text, not too often. */
class Renderer {
  constructor(target) {
    this.target = target;
    this.wanted = null;
    this.running = null;
  }

  update(text) {
    this.wanted = text;
    this.running ??= this.run();
    return this.running;
  }

  async run() {
    while (this.wanted !== null) {
      const text = this.wanted;
      this.wanted = null;
      await Promise.all([this.show(text), wait(BETWEEN)]);
    }
    this.running = null;
  }

  async show(text) {
    try {
      const { html } = await getJson("v1/render", { method: "POST", json: { markdown: text } });
      this.target.classList.remove("raw");
      setAnswerHtml(this.target, html);
    } catch {
      this.target.classList.add("raw");
      this.target.textContent = text;
    }
    this.onShown?.();
  }
}

export class AnswerView {
  /** `turn`: question, answer, quotes, ended, note; `entry()`: the document, or null; `messages()`: what was asked. */
  constructor(turn, { entry, messages, shown }) {
    this.turn = turn;
    this.entry = entry;
    this.messages = messages;
    this.body = el("div", { class: "prose", dir: "auto" });
    this.waiting = el("div", { class: "waiting", hidden: true });
    this.after = el("div", { class: "after" });
    const name = `turn-${Math.random().toString(36).slice(2)}`;
    this.element = el("article", { class: "turn", tabindex: -1, "aria-labelledby": name },
      el("h2", { id: name, class: "asked", dir: "auto", text: turn.question }), this.waiting, this.body, this.after);
    this.renderer = new Renderer(this.body);
    this.renderer.onShown = shown;
    this.open = (quote, from) => openPassage({ ...quote, kind: quote.found, said: quote.text }, this.entry(), from);
  }

  /** Say what is waited for; `progress` as the stream has it, null before anything was heard. */
  wait(progress) {
    this.element.setAttribute("aria-busy", "true");
    this.waiting.hidden = false;
    const { total = 0, cache = 0, processed = 0, time_ms: ms = 0 } = progress ?? {};
    const toRead = total - cache;
    const read = Math.max(0, processed - cache);
    let said = progress ? "Reading the question" : "Waiting for its turn";
    if (toRead > LEAST_TOLD) {
      const left = read > 0 && read < toRead ? `, about ${duration(((ms / read) * (toRead - read)) / 1000)} left` : "";
      said = `Reading ${count(read)} of ${count(toRead)} tokens${left}`;
    }
    this.waiting.replaceChildren(
      ...(toRead > LEAST_TOLD ? [bar(said, [["room", 0, 1], ["read", 0, read / toRead]])] : []),
      el("p", { class: "pulse", text: said }));
  }

  write() {
    this.waiting.hidden = true;
    this.renderer.update(this.turn.answer);
  }

  /** Show the whole answer, with its quotations. */
  async finish() {
    this.waiting.hidden = true;
    if (this.turn.answer) await this.renderer.update(this.turn.answer);
    this.element.removeAttribute("aria-busy");
    markQuotes(this.body, this.turn.quotes, this.entry(), this.open);
    const { ended, note } = this.turn;
    const why = { cancelled: "Stopped.", length: "It was cut: no more was to be written." }[ended] ?? "";
    const empty = !this.turn.answer && ended !== "cancelled" ? "The model wrote nothing." : "";
    this.after.replaceChildren(
      ...(this.turn.quotes.length ? [quoteList(this.turn.quotes, this.entry(), this.open)] : []),
      this.tools([why, empty, note].filter(Boolean).join(" ")),
    );
  }

  fail(error) {
    this.waiting.hidden = true;
    this.element.removeAttribute("aria-busy");
    this.after.replaceChildren(el("p", { class: "wrong", role: "alert" }, el("strong", { text: `${error.message}.` }),
      error.hint ? ` ${error.hint}.` : null));
  }

  tools(note) {
    const buttons = [];
    if (this.turn.answer) buttons.push(iconButton("copy", "Copy", (event) => this.copy(event.currentTarget), { words: true }));
    if (this.turn.answer && this.entry()) {
      buttons.push(iconButton("look", "Where it looked", (event) => this.look(event.currentTarget), { words: true, "aria-expanded": "false" }));
    }
    return el("div", { class: "tools" }, ...buttons, el("p", { class: "small", text: note }));
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.turn.answer);
      announce("The answer was copied.");
      button.lastChild.textContent = "Copied";
    } catch {
      announce("It could not be copied.");
      button.lastChild.textContent = "Could not be copied";
    }
    setTimeout(() => (button.lastChild.textContent = "Copy"), 2000);
  }

  async look(button) {
    const there = this.after.querySelector(".looked");
    if (there) {
      there.remove();
      button.setAttribute("aria-expanded", "false");
      return;
    }
    button.disabled = true;
    const entry = this.entry();
    let shown;
    try {
      announce("Looking");
      const json = { messages: this.messages(), answer: this.turn.answer };
      const { passages } = await getJson(documentPath(entry.id, "/looked"), { method: "POST", json });
      shown = lookedStrip(passages, this.turn.quotes, entry, (passage, from) => openPassage(passage, entry, from));
      announce("Where it looked is shown.");
    } catch (error) {
      shown = el("p", { class: "looked wrong", role: "alert", text: `${error.message}.${error.hint ? ` ${error.hint}.` : ""}` });
    }
    button.disabled = false;
    button.setAttribute("aria-expanded", "true");
    this.after.querySelector(".looked")?.remove();
    this.after.append(shown);
    shown.scrollIntoView({ block: "nearest" });
  }
}

/** The quotations of an answer that was stopped: nobody has told them. */
export async function findQuotes(answer, id) {
  try {
    return quotesOf((await getJson("v1/render", { method: "POST", json: { markdown: answer, document: id } })).quotes);
  } catch {
    return [];
  }
}
