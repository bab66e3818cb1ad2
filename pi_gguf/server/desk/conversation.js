// The questions and answers about one document, or about none.

import { events } from "./api.js";
import { AnswerView, findQuotes } from "./answer.js";
import { announce, count, el, shorten } from "./dom.js";
import { FOUND } from "./quotes.js";
import { forgetTurns, keepTurns, quotesOf, turnsOf } from "./store.js";

export class Conversation {
  /** `id` of the document, "" for none; `entry()`: the document; `model()`: the model's name; `changed()` */
  constructor(id, { entry, model, changed, grown }) {
    this.id = id;
    this.entry = entry;
    this.model = model;
    this.changed = changed;
    this.grown = grown;
    this.element = el("section", { class: "conversation", "aria-label": "Answers" });
    this.turns = turnsOf(id);
    this.views = this.turns.map((turn) => this.show(turn));
    this.running = null;
    this.restore();
  }

  /** Show what was kept: as text at once, then as the server renders it. */
  async restore() {
    for (const { body, turn } of this.views) {
      body.classList.add("raw");
      body.textContent = turn.answer;
    }
    for (const view of [...this.views].reverse()) await view.finish();
  }

  show(turn) {
    const view = new AnswerView(turn, { entry: this.entry, messages: () => this.messages(turn), shown: () => this.grown(this) });
    this.element.append(view.element);
    return view;
  }

  /** The messages of a turn: the answers above that it was asked with, and its question. */
  messages(turn) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter((one) => one.answer);
    const above = turn.above ? before.slice(-turn.above) : [];
    return [
      ...above.flatMap((one) => [{ role: "user", content: one.question }, { role: "assistant", content: one.answer }]),
      { role: "user", content: turn.question },
    ];
  }

  /** Ask; returns whether it was answered. */
  async ask(question, withAbove) {
    const above = withAbove ? this.turns.filter((one) => one.answer).length : 0;
    const turn = { question, answer: "", quotes: [], above, ended: "", note: "" };
    this.turns.push(turn);
    const view = this.show(turn);
    this.views.push(view);
    const controller = new AbortController();
    this.running = { turn, controller };
    view.wait(null);
    this.changed(this);
    announce("Asked. Esc stops it.");
    this.grown(this);
    try {
      await this.write(turn, view, controller.signal);
      this.done(turn);
    } catch (error) {
      if (error.name === "AbortError") await this.stopped(turn);
      else await this.failed(turn, view, error);
    }
    await view.finish();
    if (turn.error) view.fail(turn.error);
    this.running = null;
    this.keep();
    this.changed(this);
    this.grown(this);
    if (turn.answer) announce(`Answer: ${shorten(turn.answer, 600)}`);
    return Boolean(turn.answer) || turn.ended === "cancelled" || !turn.error;
  }

  async write(turn, view, signal) {
    const json = { model: this.model(), messages: this.messages(turn), stream: true, stream_options: { include_usage: true }, return_progress: true };
    if (this.id) json.document = this.id;
    for await (const chunk of events("v1/chat/completions", { method: "POST", json, signal })) {
      const choice = chunk.choices?.[0];
      const text = choice?.delta?.content ?? "";
      if (text) {
        turn.answer += text;
        view.write();
      } else if (chunk.prompt_progress && !turn.answer) {
        view.wait(chunk.prompt_progress);
      }
      if (choice?.finish_reason) turn.ended = choice.finish_reason;
      if (chunk.quotes) turn.quotes = quotesOf(chunk.quotes);
      if (chunk.usage) turn.usage = chunk.usage;
      if (chunk.timings) turn.timings = chunk.timings;
    }
    if (!turn.ended) throw new Error("the answer broke off");
  }

  done(turn) {
    turn.note = noteOf(turn);
    delete turn.usage;
    delete turn.timings;
  }

  async stopped(turn) {
    turn.ended = "cancelled";
    turn.quotes = turn.answer && this.id ? await findQuotes(turn.answer, this.id) : [];
    announce("Stopped.");
  }

  async failed(turn, view, error) {
    turn.ended = "failed";
    turn.error = error;
    if (turn.answer && this.id) turn.quotes = await findQuotes(turn.answer, this.id);
  }

  stop() {
    this.running?.controller.abort();
  }

  keep() {
    keepTurns(this.id, this.turns.filter((turn) => turn.answer).map(({ error, ...turn }) => turn));
  }

  clear() {
    this.stop();
    this.turns = [];
    this.views = [];
    this.element.replaceChildren();
    forgetTurns(this.id);
    this.changed(this);
  }

  /** All of it as Markdown. */
  markdown() {
    const entry = this.entry();
    const lines = [`# ${escape(entry ? entry.name : "Questions and answers")}`, "", `Answers of ${escape(this.model())}.`];
    for (const turn of this.turns.filter((one) => one.answer)) {
      lines.push("", `## ${escape(turn.question.replace(/\s+/g, " "))}`, "", turn.answer.trim());
      if (turn.quotes.length) lines.push("", "Quotations:", "");
      for (const quote of turn.quotes) {
        const where = quote.found === "none" ? FOUND.none : `${FOUND[quote.found]}, ${quote.place}`;
        lines.push(`- "${escape(quote.text.replace(/\s+/g, " "))}" (${escape(where)})`);
      }
    }
    return `${lines.join("\n")}\n`;
  }
}

const escape = (text) => text.replace(/[\\`*_[\]<>#]/g, "\\$&");

function noteOf({ usage, timings }) {
  if (!usage) return "";
  const known = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const read = usage.prompt_tokens - known;
  const seconds = timings ? timings.waited_seconds + timings.write_seconds : 0;
  const took = seconds >= 0.1 ? ` in ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s` : "";
  return `${count(usage.completion_tokens)} tokens${took}; ${count(read)} read, ${count(known)} known before.`;
}
