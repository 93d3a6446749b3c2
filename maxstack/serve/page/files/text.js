// An answer's text on the page: blocks are made once, and made again only while they grow.

import { make } from "./dom.js";
import { blocks, element } from "./markdown.js";
import { sureness } from "./tokens.js";

export class Text {
  constructor() {
    this.root = make("div", { class: "text" });
    this.shown = [];
  }

  /** Show a source; `tokens` as `placed` makes them, or none. */
  show(source, tokens = []) {
    const wanted = blocks(source);
    let same = 0;
    while (same < wanted.length && same < this.shown.length && equal(wanted[same], this.shown[same], tokens)) same += 1;
    while (this.root.children.length > same) this.root.lastChild.remove();
    for (const block of wanted.slice(same)) {
      this.root.append(element(source, block, (start, end) => pieces(source, start, end, tokens)));
      block.tokens = tokens.length > 0;
    }
    this.shown = [...this.shown.slice(0, same), ...wanted.slice(same)];
  }
}

const equal = (a, b, tokens) =>
  a.kind === b.kind && a.start === b.start && a.end === b.end && a.closed === b.closed && (tokens.length > 0) === b.tokens;

/** A slice of the source as text, a span for each token in it. */
function pieces(source, start, end, tokens) {
  if (start >= end) return [];
  if (!tokens.length) return [document.createTextNode(source.slice(start, end))];
  const nodes = [];
  let at = start;
  for (let i = first(tokens, start); i < tokens.length && tokens[i][0] < end; i += 1) {
    const [from, to] = [Math.max(tokens[i][0], at), Math.min(tokens[i][1], end)];
    if (from > at) nodes.push(document.createTextNode(source.slice(at, from)));
    if (to > from) {
      nodes.push(make("span", { class: "token", data: { i, sure: sureness(tokens[i][3]) } }, source.slice(from, to)));
    }
    at = Math.max(at, to);
  }
  if (at < end) nodes.push(document.createTextNode(source.slice(at, end)));
  return nodes;
}

/** The first token that reaches past a place, by bisection. */
function first(tokens, place) {
  let [low, high] = [0, tokens.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle][1] > place) high = middle;
    else low = middle + 1;
  }
  return low;
}
