// How a document fits the window, how far it is read, and how far the window was measured to reach.

import { bar, byId, count, duration, el, icon } from "./dom.js";
import { isActive } from "./library.js";

function standing(entry) {
  const left = entry.seconds_left > 0 ? duration(entry.seconds_left) : "";
  switch (entry.status) {
    case "reading":
      return `Reading: ${count(entry.read)} of ${count(entry.tokens)} tokens${left ? `, about ${left} left` : ""}.`;
    case "waiting":
      return `Waits until others are read${left ? `; reading takes about ${left}` : ""}. You can ask all the same.`;
    case "unread":
      return `It is not read${left ? `: that takes about ${left}` : ""}. A question reads it too.`;
    case "failed":
      return `It could not be read: ${entry.error || "no reason was given"}`;
    default:
      return "";
  }
}

/** Draw it for the chosen document. `act`: read() again, stop() reading */
export function drawFit(entry, act) {
  const section = byId("fit");
  section.hidden = !entry;
  if (!entry) return;
  const { tokens, window: whole, read, room } = entry;
  const done = entry.status === "kept" ? tokens : read;
  const share = (some) => some / whole;
  const label = `${count(tokens)} of ${count(whole)} tokens of the window are the document, ${count(done)} of them read`;
  const drawn = bar(label, [["room", 0, 1], ["whole", 0, share(tokens)], ["read", 0, share(done)]]);
  if (entry.status === "reading") {
    drawn.setAttribute("role", "progressbar");
    for (const [name, value] of [["valuemin", 0], ["valuemax", tokens], ["valuenow", read]]) drawn.setAttribute(`aria-${name}`, value);
    drawn.setAttribute("aria-label", "Reading");
  }
  const said = standing(entry);
  const focused = section.contains(document.activeElement) ? document.activeElement.textContent : null;
  section.replaceChildren(
    drawn,
    el("p", { class: "scale" }, el("span", { text: `${count(tokens)} tokens` }),
      el("span", { text: `${count(room)} of ${count(whole)} left for questions and answers` })),
    ...(said ? [el("p", { class: `standing ${entry.status}` }, el("span", { text: said }), actionOf(entry, act))] : []),
    ...(entry.trust ? [el("p", { class: "trust", text: sentence(entry.trust) })] : []),
  );
  if (focused) [...section.querySelectorAll("button")].find((one) => one.textContent === focused)?.focus();
}

function actionOf(entry, act) {
  if (isActive(entry)) return el("button", { type: "button", class: "quiet", text: "Stop", on: { click: act.stop } });
  return el("button", { type: "button", class: "quiet", on: { click: act.read } }, icon("again"), el("span", { text: "Read it now" }));
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
