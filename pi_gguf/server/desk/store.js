// What this browser keeps: answers by document, the appearance, a choice or two. Bounded; nothing of it is trusted.

const MOST_TURNS = 60;
const MOST_CHARACTERS = 1_500_000;
const CHAT = "desk.chat.";

function safely(action, otherwise) {
  try {
    return action();
  } catch {
    return otherwise;
  }
}

export const setting = (name, otherwise) => safely(() => localStorage.getItem(`desk.${name}`), null) ?? otherwise;

export function setSetting(name, value) {
  safely(() => (value === null ? localStorage.removeItem(`desk.${name}`) : localStorage.setItem(`desk.${name}`, value)));
}

const isText = (value) => typeof value === "string";
const isPlace = (value) => Number.isInteger(value) && value >= 0;

function quote(found) {
  if (!found || !isText(found.text) || !["exact", "near", "none"].includes(found.found)) return null;
  const there = found.found !== "none" && isPlace(found.start) && isPlace(found.end);
  return { text: found.text, found: there ? found.found : "none", start: there ? found.start : null,
    end: there ? found.end : null, place: isText(found.place) ? found.place : "" };
}

/** The quotations of an answer as the page knows them, whatever was given. */
export const quotesOf = (given) => (Array.isArray(given) ? given.map(quote).filter(Boolean) : []);

function turn(kept) {
  if (!kept || !isText(kept.question) || !isText(kept.answer)) return null;
  return { question: kept.question, answer: kept.answer, quotes: quotesOf(kept.quotes),
    above: isPlace(kept.above) ? kept.above : 0, ended: isText(kept.ended) ? kept.ended : "stop", note: isText(kept.note) ? kept.note : "" };
}

/** The turns that were kept of a conversation; one without a document has the id "". */
export function turnsOf(id) {
  const kept = safely(() => JSON.parse(localStorage.getItem(CHAT + id)), null);
  return Array.isArray(kept?.turns) ? kept.turns.map(turn).filter(Boolean).slice(-MOST_TURNS) : [];
}

const kept = () => safely(() => Object.keys(localStorage).filter((key) => key.startsWith(CHAT)), []);
const when = (key) => safely(() => JSON.parse(localStorage.getItem(key)).when, 0) || 0;

/** Keep a conversation; the oldest of the others go where there is no room. */
export function keepTurns(id, turns) {
  if (!turns.length) return forgetTurns(id);
  let some = turns.slice(-MOST_TURNS);
  while (some.length > 1 && JSON.stringify(some).length > MOST_CHARACTERS) some = some.slice(1);
  const text = JSON.stringify({ when: Date.now(), turns: some });
  const others = kept().filter((key) => key !== CHAT + id).sort((a, b) => when(a) - when(b));
  for (;;) {
    if (safely(() => (localStorage.setItem(CHAT + id, text), true), false)) return;
    if (!others.length) return;
    safely(() => localStorage.removeItem(others.shift()));
  }
}

export function forgetTurns(id) {
  safely(() => localStorage.removeItem(CHAT + id));
}
