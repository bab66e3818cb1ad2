// Quotations of an answer: marked where they stand in it, and listed under it with what was found of each.

import { el, placeOf } from "./dom.js";

export const FOUND = { exact: "word for word", near: "near", none: "not in the document" };

const LEFT_OUT = /[\s*_`\\>]/;

/** Letters of a text without white space and Markdown's marks, each with where it stands. */
function lettersOf(nodes) {
  const places = [];
  let text = "";
  for (const node of nodes) {
    for (let i = 0; i < node.data.length; i++) {
      if (LEFT_OUT.test(node.data[i])) continue;
      text += node.data[i];
      places.push([node, i]);
    }
  }
  return { text, places };
}

function textNodes(element) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT, (node) =>
    node.parentElement.closest(".host") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
  const found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  return found;
}

/** Where each quotation stands in what is shown, in order and apart; those that cannot be told are left out. */
function rangesOf(element, quotes) {
  const { text, places } = lettersOf(textNodes(element));
  const found = [];
  let from = 0;
  quotes.forEach((quote, number) => {
    const wanted = [...quote.text].filter((letter) => !LEFT_OUT.test(letter)).join("");
    const at = wanted ? text.indexOf(wanted, from) : -1;
    if (at < 0) return;
    from = at + wanted.length;
    found.push({ quote, number, pieces: piecesOf(places.slice(at, from)) });
  });
  return found;
}

function piecesOf(places) {
  const pieces = [];
  for (const [node, offset] of places) {
    const last = pieces.at(-1);
    if (last?.node === node) last.end = offset + 1;
    else pieces.push({ node, start: offset, end: offset + 1 });
  }
  return pieces;
}

/** Mark quotations in an answer that is shown; `open(quote, from)` is called for one that has a passage. */
export function markQuotes(element, quotes, entry, open) {
  for (const { quote, number, pieces } of rangesOf(element, quotes).reverse()) {
    const marks = pieces.map(({ node, start, end }) => {
      const mark = el("mark", { class: quote.found, title: titleOf(quote, entry) });
      const piece = node.splitText(start);
      piece.splitText(end - start);
      piece.replaceWith(mark);
      mark.append(piece);
      return mark;
    });
    marks.at(-1).dataset.number = number + 1;
    if (quote.found === "none") continue;
    for (const mark of marks) mark.addEventListener("click", () => open(quote, marks[0]));
    marks[0].tabIndex = 0;
    marks[0].setAttribute("role", "button");
    marks[0].addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(quote, marks[0]);
    });
  }
}

const titleOf = (quote, entry) => (quote.found === "none" ? FOUND.none : `${FOUND[quote.found]}, ${placeOf(quote, entry)}`);

/** The quotations as a list; each that has a passage is a button. */
export function quoteList(quotes, entry, open) {
  const items = quotes.map((quote, index) => {
    const inside = [
      el("span", { class: "number", "aria-hidden": "true", text: index + 1 }),
      el("q", { dir: "auto", text: quote.text }),
      el("span", { class: "where" }, el("span", { class: "found", text: FOUND[quote.found] }),
        quote.found === "none" ? null : el("span", { text: placeOf(quote, entry) })),
    ];
    return el("li", { class: quote.found }, quote.found === "none" ? el("div", { class: "quotation" }, ...inside)
      : el("button", { type: "button", class: "quotation", on: { click: (event) => open(quote, event.currentTarget) } }, ...inside));
  });
  return el("section", { class: "quotes", "aria-label": "Quotations" }, el("ol", {}, ...items));
}
