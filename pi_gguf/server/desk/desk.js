// The page: what is chosen, what is shown, and the keys.

import { documentPath, getJson, request, ServerError, Unreachable, whenUnreachable } from "./api.js";
import { Conversation } from "./conversation.js";
import { confirmed, lettersOn, showKeys } from "./dialogs.js";
import { announce, bar, byId, count, el, icon, iconButton, scrollBehavior } from "./dom.js";
import { drawFit } from "./fit.js";
import { Library, stateOf } from "./library.js";
import { closePassage, isPassageOpen } from "./passage.js";
import { setSetting, setting } from "./store.js";

const BEAT = 10_000;
const WORDS_A_TOKEN = 0.75;
const NEAR_END = 120;
const LOCAL = ["localhost", "127.0.0.1", "[::1]"];

let model = null;
let chosen = "";
let unreachable = false;
const conversations = new Map();

const library = new Library({
  chosen: (id) => choose(id),
  changed: () => drawDocument(),
  removed: (id) => {
    conversations.get(id)?.clear();
    conversations.delete(id);
    if (id === chosen) choose("");
  },
  refused: (name, error) => refuse(name, error),
});

const entryOf = (id) => library.entries.get(id) ?? null;

function conversation() {
  if (!conversations.has(chosen)) {
    const id = chosen;
    conversations.set(id, new Conversation(id, { entry: () => entryOf(id), model: () => model?.id ?? "",
      changed: () => drawAsking(), grown: (one) => one.id === chosen && follow() }));
  }
  return conversations.get(chosen);
}

// What is chosen

function choose(id, { focus = true } = {}) {
  chosen = entryOf(id) ? id : "";
  const hash = chosen ? `#${encodeURIComponent(chosen)}` : "";
  if (location.hash !== hash) history.replaceState(null, "", hash || location.pathname + location.search);
  closePassage();
  openLibrary(false, { focus: false });
  library.choose(chosen);
  drawDocument();
  byId("turns").replaceChildren(conversation().element);
  drawAsking();
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  if (focus && !byId("question").disabled) byId("question").focus({ preventScroll: true });
}

const ofHash = () => {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
};

// What is shown

function drawDocument() {
  const entry = entryOf(chosen);
  byId("name").textContent = entry ? entry.name : model?.meta.chat ? "Without a document" : "Desk";
  byId("facts").textContent = entry ? `${capital(stateOf(entry))}; ${entry.format}, ${count(entry.characters)} characters` : "";
  document.title = entry ? `${entry.name} - Desk` : "Desk";
  drawFit(entry, { read: () => act(chosen, "/read"), stop: () => act(chosen, "/stop") });
  drawEmpty(entry);
}

function drawEmpty(entry) {
  const section = byId("empty");
  section.hidden = Boolean(entry) || conversation().turns.length > 0;
  if (section.hidden || !model) return;
  const window = model.meta.n_ctx;
  const where = LOCAL.includes(location.hostname) ? "It stays on this machine." : `It is sent to ${location.hostname} and nowhere else.`;
  section.replaceChildren(
    el("p", { class: "large", text: "Drop a book and ask." }),
    el("p", { text: `PDF, EPUB, Word, HTML, Markdown or plain text, up to ${count(window)} tokens: about ${count(Math.round((window * WORDS_A_TOKEN) / 1000) * 1000 || window * WORDS_A_TOKEN)} words. It is read once, then kept. ${where}` }),
    el("button", { type: "button", class: "strong", text: "Choose a document", on: { click: () => byId("file").click() } }),
    el("p", { class: "small", text: model.meta.chat ? "Or ask without one, below." : "This model has no chat template: it answers about documents only." }),
  );
}

function drawAsking() {
  const entry = entryOf(chosen);
  const { running, turns } = conversation();
  const can = Boolean(model) && (entry ? entry.status !== "failed" : model.meta.chat);
  const question = byId("question");
  question.disabled = !can;
  question.placeholder = !can ? "Drop a document to ask about it" : model.meta.form === "plain" && entry
    ? "The model goes on with what you write here" : entry ? "Ask about this document" : "Ask";
  byId("without").hidden = !(entry && model?.meta.chat);
  byId("ask-note").hidden = !can;
  byId("send").hidden = Boolean(running);
  byId("send").disabled = !can;
  byId("stop").hidden = !running;
  const answered = turns.some((turn) => turn.answer);
  byId("above").closest("label").hidden = !entry || model?.meta.form !== "chat";
  byId("above").disabled = !answered;
  byId("export").hidden = byId("clear").hidden = !answered;
  drawEmpty(entry);
}

/** Stay at the end while an answer grows, if one was there. */
let atEnd = true;
function follow() {
  const scroll = byId("scroll");
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

function notice(title, text, { more = null, kind = "wrong" } = {}) {
  const made = el("div", { class: `notice ${kind}`, role: "alert" },
    el("div", {}, el("p", { class: "notice-title" }, el("bdi", { text: title })), el("p", { text }), more));
  made.append(iconButton("close", "Dismiss", () => made.remove()));
  byId("notices").prepend(made);
  byId("scroll").scrollTop = 0;
}

function refuse(name, error) {
  if (error instanceof Unreachable) return notice(name, "It was not added: the server does not answer.");
  const begin = `${name}: `;
  const said = `${capital(error.message.startsWith(begin) ? error.message.slice(begin.length) : error.message)}.`;
  if (!(error.tokens > error.window)) return notice(name, `${said}${error.hint ? ` ${capital(error.hint)}.` : ""}`);
  const { tokens, window } = error;
  const parts = Math.ceil(tokens / (window - Math.min(1024, window / 8)));
  notice(name, said, { more: el("div", {},
    bar(`The document has ${count(tokens)} tokens, the window ${count(window)}`, [["over", 0, 1], ["read", 0, window / tokens]]),
    el("p", { class: "scale" }, el("span", { text: `window: ${count(window)} tokens` }), el("span", { text: `document: ${count(tokens)}` })),
    el("p", { text: `Split it into ${parts} files and add each, or serve a file with a longer window. Nothing is ever cut unsaid.` })) });
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// What is done

/** Read a document, or stop that. */
async function act(id, what) {
  try {
    await request(documentPath(id, what), { method: "POST" });
    await library.load();
  } catch (error) {
    notice(entryOf(id)?.name ?? "Document", `${capital(error.message)}.`);
  }
}

async function ask() {
  const question = byId("question");
  const text = question.value.trim();
  const one = conversation();
  if (!text || one.running || question.disabled) return;
  question.value = "";
  grow();
  atEnd = true;
  const answered = await one.ask(text, chosen ? byId("above").checked && model.meta.form === "chat" : true);
  if (answered || one !== conversation() || question.value) return;
  question.value = text; // to be asked again
  grow();
}

function grow() {
  const question = byId("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

function saveMarkdown() {
  const one = conversation();
  const url = URL.createObjectURL(new Blob([one.markdown()], { type: "text/markdown" }));
  const name = (one.entry()?.name ?? "answers").replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} ._-]/gu, "_");
  const link = el("a", { href: url, download: `${name || "answers"} - answers.md` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function clearAnswers() {
  if (await confirmed("Clear these answers?", "Questions and answers about it are deleted from this browser; the document stays.", "Clear")) {
    conversation().clear();
  }
}

// Library on a small screen, appearance

function openLibrary(open, { focus = true } = {}) {
  const nav = byId("library");
  const was = nav.classList.contains("open");
  nav.classList.toggle("open", open);
  byId("shade").hidden = !open;
  byId("open-library").setAttribute("aria-expanded", String(open));
  byId("main").inert = open;
  if (open && focus) nav.querySelector("[aria-current], #add").focus();
  else if (was && focus) byId("open-library").focus();
}

const THEMES = { system: "as the system", light: "light", dark: "dark" };

function drawTheme() {
  const name = setting("theme", "system") in THEMES ? setting("theme", "system") : "system";
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const label = `Appearance: ${THEMES[name]}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
  byId("theme").replaceChildren(icon(name));
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf(setting("theme", "system")) + 1) % names.length];
  setSetting("theme", name === "system" ? null : name);
  drawTheme();
  announce(`Appearance: ${THEMES[name]}`);
}

// The server

async function begin() {
  const { data } = await getJson("v1/models");
  model = data[0];
  byId("model").textContent = model.id;
  byId("model").title = `${model.id}, ${count(model.meta.n_ctx)} tokens`;
  await library.load();
  choose(ofHash(), { focus: false });
}

async function beat() {
  try {
    const answer = await fetch("health", { cache: "no-store" });
    if (!answer.ok) throw new Error("not healthy");
    if (unreachable) await back();
  } catch {
    lost();
  }
}

function lost() {
  if (unreachable) return;
  unreachable = true;
  byId("offline").textContent = `The server at ${location.host} does not answer. Trying again.`;
  byId("offline").hidden = false;
  retry();
}

async function retry() {
  for (let seconds = 1; unreachable; seconds = Math.min(8, 2 * seconds)) {
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    await beat();
  }
}

async function back() {
  unreachable = false;
  byId("offline").hidden = true;
  announce("The server answers again.");
  await (model ? library.load() : begin());
}

// Keys

function step(by) {
  const turns = [...byId("turns").querySelectorAll(".turn")];
  if (!turns.length) return;
  const at = turns.indexOf(document.activeElement?.closest(".turn"));
  const next = at < 0 ? (by > 0 ? 0 : turns.length - 1) : Math.max(0, Math.min(turns.length - 1, at + by));
  turns[next].focus({ preventScroll: true });
  turns[next].scrollIntoView({ block: "start", behavior: scrollBehavior() });
}

function escape() {
  if (byId("library").classList.contains("open")) openLibrary(false);
  else if (conversation().running) conversation().stop();
  else if (isPassageOpen()) closePassage();
}

const LETTERS = {
  "/": () => byId("question").focus(),
  j: () => step(1),
  k: () => step(-1),
  l: () => (matchMedia("(max-width: 760px)").matches ? openLibrary(true) : byId("library").querySelector("[aria-current], #add").focus()),
  "?": () => showKeys(),
};

function onKey(event) {
  if (byId("dialog").open || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "Escape") return escape();
  const writing = event.target.closest?.("textarea, input:not([type=checkbox])");
  if (writing || !lettersOn() || !(event.key in LETTERS)) return;
  event.preventDefault();
  LETTERS[event.key]();
}

function wire() {
  const icons = { "close-library": "close", "open-library": "menu", export: "save", clear: "clear", help: "keys", send: "send" };
  for (const [id, name] of Object.entries(icons)) byId(id).append(icon(name));
  byId("add").prepend(icon("add"));
  const on = (id, event, listener) => byId(id).addEventListener(event, listener);
  on("add", "click", () => byId("file").click());
  on("file", "change", (event) => {
    library.add([...event.target.files]);
    event.target.value = "";
  });
  on("open-library", "click", () => openLibrary(true));
  on("close-library", "click", () => openLibrary(false));
  on("shade", "click", () => openLibrary(false));
  on("export", "click", saveMarkdown);
  on("clear", "click", clearAnswers);
  on("theme", "click", nextTheme);
  on("without", "click", () => choose(""));
  on("help", "click", () => showKeys());
  on("stop", "click", () => conversation().stop());
  on("skip", "click", (event) => {
    event.preventDefault();
    byId("question").focus();
  });
  on("question", "input", grow);
  on("question", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  on("ask", "submit", (event) => {
    event.preventDefault();
    ask();
  });
  on("scroll", "scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = byId("scroll");
    atEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => ofHash() !== chosen && choose(ofHash()));
  wireDrop();
}

function wireDrop() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let timer;
  const show = (shown) => {
    clearTimeout(timer);
    byId("drop").hidden = !shown;
  };
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(true);
    timer = setTimeout(() => show(false), 300);
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(false);
    library.add([...event.dataTransfer.files]);
  });
}

async function start() {
  drawTheme();
  wire();
  whenUnreachable(lost);
  setInterval(() => document.visibilityState === "visible" && !unreachable && beat(), BEAT);
  try {
    await begin();
  } catch (error) {
    if (!(error instanceof ServerError)) return;
    notice("The server refuses", `${capital(error.message)}.`);
  }
}

start();
