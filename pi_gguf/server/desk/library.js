// The documents that the server keeps: the list, adding, reading's progress, deleting.

import { documentPath, events, getJson, request, Unreachable } from "./api.js";
import { confirmed } from "./dialogs.js";
import { announce, byId, count, el, iconButton, percent, size } from "./dom.js";

const POLL = 2500;

export const isActive = (entry) => entry.status === "waiting" || entry.status === "reading";

/** What a document's state is, in a few words. */
export function stateOf(entry) {
  if (entry.status === "reading") return `reading, ${percent(entry.tokens ? entry.read / entry.tokens : 0)}`;
  return { waiting: "waits to be read", kept: "ready", unread: "not read", failed: "could not be read" }[entry.status] ?? "";
}

export class Library {
  /** `on`: chosen(id), changed(entry), removed(id), refused(name, error), busy() */
  constructor(on) {
    this.on = on;
    this.entries = new Map();
    this.rows = new Map();
    this.adding = [];
    this.chosen = "";
    this.watched = null;
    this.heard = new Map(); // when a stream told last of a document
    this.timer = null;
  }

  async load() {
    const asked = performance.now();
    const { data, kept_bytes: kept, limit_bytes: limit } = await getJson("v1/documents");
    const there = new Set(data.map((entry) => entry.id));
    for (const id of [...this.entries.keys()]) if (!there.has(id)) this.forget(id);
    // a document's stream knows more than this list, which may have been on its way for a while
    const known = (id) => id === this.watched?.id || this.heard.get(id) > asked;
    for (const entry of data) if (!known(entry.id)) this.take(entry);
    byId("kept").textContent = kept > 0
      ? `${size(kept)} kept${limit ? ` of at most ${size(limit)}` : ""}` : "";
    this.draw();
    this.poll();
  }

  /** While a document is read that is not the chosen one, ask how far it is: each watched stream holds a connection. */
  poll() {
    clearTimeout(this.timer);
    const others = [...this.entries.values()].some((entry) => isActive(entry) && entry.id !== this.watched?.id);
    if (others) this.timer = setTimeout(() => this.load().catch(() => this.poll()), POLL);
  }

  take(entry) {
    this.entries.set(entry.id, entry);
    this.drawRow(entry);
    if (entry.id === this.chosen) {
      this.on.changed(entry);
      if (isActive(entry)) this.watch(entry.id);
    }
  }

  forget(id) {
    this.entries.delete(id);
    this.heard.delete(id);
    this.rows.get(id)?.row.remove();
    this.rows.delete(id);
    if (this.watched?.id === id) this.unwatch();
    this.on.removed(id);
  }

  choose(id) {
    this.chosen = id;
    if (this.watched && this.watched.id !== id) this.unwatch();
    this.draw();
    const entry = this.entries.get(id);
    if (entry && isActive(entry)) this.watch(id);
    this.poll();
  }

  unwatch() {
    this.watched?.controller.abort();
    this.watched = null;
  }

  async watch(id) {
    if (this.watched?.id === id) return;
    this.unwatch();
    const mine = { id, controller: new AbortController() };
    this.watched = mine;
    let last = null;
    try {
      for await (const entry of events(documentPath(id, "/progress"), { signal: mine.controller.signal })) {
        last = entry;
        this.heard.set(id, performance.now());
        this.take(entry);
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Unreachable)) console.warn(error.message);
    }
    if (this.watched !== mine) return;
    this.watched = null;
    if (last?.status === "kept") announce(`${last.name} was read.`);
    if (last && !isActive(last)) this.load().catch(() => {});
    else this.poll(); // the stream broke
  }

  async add(files) {
    for (const file of files) {
      this.adding.push(file.name);
      this.draw();
    }
    let chosen = false;
    for (const file of files) {
      announce(`Adding ${file.name}`);
      try {
        const body = new FormData();
        body.append("file", file, file.name);
        const entry = await getJson("v1/documents", { method: "POST", body });
        this.take(entry);
        if (!chosen) this.on.chosen(entry.id);
        chosen = true;
      } catch (error) {
        this.on.refused(file.name, error);
      }
      this.adding.splice(this.adding.indexOf(file.name), 1);
      this.draw();
    }
    await this.load().catch(() => {});
  }

  async remove(id) {
    const entry = this.entries.get(id);
    if (!entry) return;
    const text = `Its text and what was read of it (${size(entry.kept_bytes)}) are deleted where the server runs, its answers in this browser.`;
    if (!(await confirmed(`Delete ${entry.name}?`, text, "Delete"))) return;
    try {
      await request(documentPath(id), { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) return this.on.refused(entry.name, error);
    }
    announce(`${entry.name} was deleted.`);
    this.forget(id);
    await this.load().catch(() => {});
  }

  draw() {
    const list = byId("documents");
    for (const pending of list.querySelectorAll(".pending")) pending.remove();
    const sorted = [...this.entries.values()].sort((a, b) => b.added - a.added);
    const rows = sorted.map((entry) => this.drawRow(entry));
    rows.forEach((row, i) => list.children[i] !== row && list.insertBefore(row, list.children[i] ?? null));
    for (const name of this.adding) {
      list.prepend(el("li", { class: "pending" },
        el("bdi", { class: "file", text: name }), el("span", { class: "state", text: "is being added" })));
    }
    if (!list.children.length) list.append(el("li", { class: "pending none", text: "None yet." }));
  }

  drawRow(entry) {
    let made = this.rows.get(entry.id);
    if (!made) {
      made = { name: el("bdi", { class: "file" }), facts: el("span", { class: "small" }), state: el("span", { class: "state" }) };
      made.button = el("button", { type: "button", class: "document", on: { click: () => this.on.chosen(entry.id) } },
        made.name, made.facts, made.state);
      made.row = el("li", {}, made.button,
        iconButton("bin", `Delete ${entry.name}`, () => this.remove(entry.id)));
      this.rows.set(entry.id, made);
    }
    made.name.textContent = entry.name;
    const kept = entry.kept_bytes ? `, ${size(entry.kept_bytes)}` : "";
    made.facts.textContent = `${count(entry.tokens)} tokens${kept}`;
    made.state.textContent = stateOf(entry);
    made.state.className = `state ${entry.status}`;
    if (entry.id === this.chosen) made.button.setAttribute("aria-current", "true");
    else made.button.removeAttribute("aria-current");
    return made.row;
  }
}
