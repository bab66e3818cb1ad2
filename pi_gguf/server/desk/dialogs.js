// Questions that have to be answered first: the key, a deletion; and the list of keys.

import { byId, el } from "./dom.js";
import { setSetting, setting } from "./store.js";

let open = null;

/** Show a dialog and wait; returns what closed it, null where it was dismissed. */
function show(title, content, buttons, { form = false } = {}) {
  open?.(null);
  const dialog = byId("dialog");
  const { promise, resolve } = withResolvers();
  const close = (value) => {
    if (open !== close) return;
    open = null;
    if (dialog.open) dialog.close();
    resolve(value);
  };
  open = close;
  const row = el("div", { class: "buttons" }, ...buttons(close));
  dialog.replaceChildren(
    el(form ? "form" : "div", {}, el("h2", { id: "dialog-name", text: title }), ...content, row),
  );
  dialog.oncancel = (event) => {
    event.preventDefault();
    close(null);
  };
  dialog.onclose = () => {
    if (!dialog.open) close(null); // else it is the end of the one before
  };
  dialog.onclick = (event) => {
    if (event.target === dialog) close(null);
  };
  dialog.showModal();
  return promise;
}

function withResolvers() {
  let resolve;
  const promise = new Promise((done) => (resolve = done));
  return { promise, resolve };
}

const button = (text, kind, onClick, props = {}) =>
  el("button", { type: "button", class: kind, text, on: { click: onClick }, ...props });

/** Ask whether to do what cannot be undone. */
export async function confirmed(title, text, action) {
  const answer = await show(title, [el("p", { text })], (close) => [
    button("Cancel", "plain", () => close(null), { autofocus: true }),
    button(action, "danger", () => close(true)),
  ]);
  return answer === true;
}

/** Ask for the server's key; null where it is not given. */
export function askKey(wrong) {
  const input = el("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: true,
    autofocus: true, "aria-describedby": "key-note", "aria-invalid": wrong ? "true" : null });
  const note = wrong ? "That is not its key." : "It is kept until this tab is closed, and sent to this server only.";
  const shown = show("This server has a key", [
    el("label", { for: "key", text: "Key" }), input, el("p", { id: "key-note", class: wrong ? "wrong" : null, text: note }),
  ], (close) => [
    button("Not now", "plain", () => close(null)),
    el("button", { type: "submit", class: "strong", text: "Use it" }),
  ], { form: true });
  const close = open;
  byId("dialog").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    close(input.value.trim() || null);
  });
  return shown;
}

const KEYS = [
  ["/", "write a question"], ["Enter", "ask"], ["Shift + Enter", "begin a new line"],
  ["Esc", "stop the answer, close what is open"], ["j, k", "next answer, the one before"],
  ["l", "go to the library"], ["?", "show these keys"],
];

export const lettersOn = () => setting("letters", "on") === "on";

/** Show what the keys do. */
export function showKeys() {
  const rows = KEYS.map(([keys, does]) =>
    el("div", {}, el("dt", {}, ...keys.split(", ").map((key) => el("kbd", { text: key }))), el("dd", { text: does })));
  const letters = el("input", { type: "checkbox", id: "letters",
    on: { change: (event) => setSetting("letters", event.target.checked ? "on" : "off") } });
  letters.checked = lettersOn();
  return show("Keys", [
    el("dl", { class: "keys" }, ...rows),
    el("label", { class: "check" }, letters, " single letters are keys"),
  ], (close) => [button("Close", "plain", () => close(null), { autofocus: true })]);
}
