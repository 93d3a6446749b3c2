// The part of Markdown that models write, as elements. Every text node is a slice of the source, so that tokens keep
// their place; nothing is ever parsed as HTML, and only http(s) and mailto become links.

import { copy, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const HEADING = /^(#{1,6})\s+/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ROW = /^\s*\|.*\|\s*$/;

/** Lines of a source: [start, end] each, without their line breaks. */
function linesOf(source, start, end) {
  const lines = [];
  for (let at = start; at < end || (at === end && lines.length === 0);) {
    const stop = source.indexOf("\n", at);
    const last = stop < 0 || stop >= end ? end : stop;
    lines.push([at, last]);
    at = last + 1;
  }
  return lines;
}

/** Blocks of a source: {kind, start, end, lines, …}. The last one may still grow. */
export function blocks(source) {
  const lines = linesOf(source, 0, source.length);
  const found = [];
  for (let i = 0; i < lines.length;) {
    const text = (j) => source.slice(...lines[j]);
    if (!text(i).trim()) { i += 1; continue; }
    let j = i + 1;
    const block = { kind: "paragraph", from: i };
    const fence = FENCE.exec(text(i));
    const whilst = (fits) => { while (j < lines.length && fits(text(j))) j += 1; };
    if (fence) {
      block.kind = "code";
      block.language = fence[2];
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      whilst((line) => !close.test(line));
      block.closed = j < lines.length;
      block.inner = lines.slice(i + 1, j);
      if (block.closed) j += 1;
    } else if (RULE.test(text(i))) block.kind = "rule";
    else if (HEADING.test(text(i))) block.kind = "heading";
    else if (QUOTE.test(text(i))) { block.kind = "quote"; whilst((line) => QUOTE.test(line)); }
    else if (ITEM.test(text(i))) { block.kind = "list"; whilst((line) => ITEM.test(line) || /^\s{2,}\S/.test(line)); }
    else if (ROW.test(text(i)) && i + 1 < lines.length && /^[\s|:-]*-[\s|:-]*$/.test(text(i + 1))) {
      block.kind = "table";
      whilst((line) => ROW.test(line));
    } else whilst((line) => line.trim() && ![FENCE, HEADING, QUOTE, ITEM, RULE].some((other) => other.test(line)));
    block.lines = lines.slice(i, j);
    [block.start, block.end] = [lines[i][0], lines[j - 1][1]];
    found.push(block);
    i = j;
  }
  return found;
}

/** A block as an element. `piece(start, end)` makes the nodes of a slice of the source. */
export function element(source, block, piece) {
  const inline = (start, end) => inlines(source, start, end, piece);
  const { lines } = block;
  switch (block.kind) {
    case "code": return code(source, block, piece);
    case "rule": return make("hr");
    case "heading": {
      const [start, end] = lines[0];
      const marks = HEADING.exec(source.slice(start, end));
      return make(`h${Math.min(marks[1].length, 4)}`, {}, ...inline(start + marks[0].length, end));
    }
    case "quote": return make("blockquote", {}, ...lines.map(([start, end]) =>
      make("p", {}, ...inline(start + QUOTE.exec(source.slice(start, end))[0].length, end))));
    case "list": return list(source, lines, inline);
    case "table": return table(source, lines, inline);
    default: return make("p", {}, ...inline(block.start, block.end));
  }
}

function code(source, block, piece) {
  const [first, last] = [block.inner[0], block.inner.at(-1)];
  const nodes = first ? piece(first[0], last[1]) : [];
  const button = make("button", { type: "button", onclick: () => copy(first ? source.slice(first[0], last[1]) : "", button) }, make("span", {}, "Copy"));
  return make("div", { class: "code" },
    make("div", {}, make("span", {}, block.language || "code"), button),
    make("pre", { tabIndex: 0, "aria-label": "code" }, make("code", {}, ...nodes)));
}

/** Items by their indentation; lines that continue an item belong to it. */
function list(source, lines, inline) {
  const stack = [];
  let root;
  for (const [start, end] of lines) {
    const mark = ITEM.exec(source.slice(start, end));
    if (!mark) {
      const text = start + source.slice(start, end).search(/\S/);
      stack.at(-1).item.append("\n", ...inline(text, end));
      continue;
    }
    const depth = mark[1].length;
    while (stack.length > 1 && depth < stack.at(-1).depth) stack.pop();
    if (!stack.length || depth > stack.at(-1).depth + 1) {
      const ordered = /\d/.test(mark[2]);
      const made = make(ordered ? "ol" : "ul", ordered ? { start: Number.parseInt(mark[2], 10) } : {});
      if (stack.length) stack.at(-1).item.append(made);
      else root = made;
      stack.push({ depth, made });
    }
    const item = make("li", {}, ...inline(start + mark[0].length, end));
    stack.at(-1).made.append(item);
    stack.at(-1).item = item;
  }
  return root;
}

function table(source, lines, inline) {
  const row = ([start, end], name) => {
    const line = source.slice(start, end);
    const bars = [...line.matchAll(/(?<!\\)\|/g)].map((match) => start + match.index);
    return make("tr", {}, ...bars.slice(0, -1).map((bar, i) => make(name, {}, ...inline(...trimmed(source, bar + 1, bars[i + 1])))));
  };
  const [head, , ...rest] = lines;
  return make("div", { class: "table" }, make("table", {},
    make("thead", {}, row(head, "th")), make("tbody", {}, ...rest.map((line) => row(line, "td")))));
}

function trimmed(source, start, end) {
  while (start < end && source[start] === " ") start += 1;
  while (end > start && source[end - 1] === " ") end -= 1;
  return [start, end];
}

// What begins something inside a line: code, bold, italic, struck out, a link, a bare address.
const INLINE = /(`+)(?!`)([^]*?[^`])\1(?!`)|(\*\*|__)(?=\S)([^]*?\S)\3|(?<![\w*])([*_])(?=[^\s*_])([^*_\n]*?[^\s*_])\5(?!\w)|~~(?=\S)([^~\n]*?\S)~~|\[([^\]\n]+)\]\(([^()\s]+)\)|\bhttps?:\/\/[^\s<>()"'`]+[^\s<>()"'`.,:;!?]/g;

function inlines(source, start, end, piece) {
  const nodes = [];
  let at = start;
  for (const match of source.slice(start, end).matchAll(INLINE)) {
    const from = start + match.index;
    if (from < at) continue;
    nodes.push(...piece(at, from), inner(source, match, from, piece));
    at = from + match[0].length;
  }
  nodes.push(...piece(at, end));
  return nodes;
}

function inner(source, match, from, piece) {
  const [whole, ticks, , bold, , italic, , struck, label, address] = match;
  const within = (name, marks) => make(name, {}, ...inlines(source, from + marks, from + whole.length - marks, piece));
  if (ticks) return make("code", {}, ...piece(from + ticks.length, from + whole.length - ticks.length));
  if (bold) return within("strong", 2);
  if (italic) return within("em", 1);
  if (struck) return within("s", 2);
  const target = address ?? whole;
  const text = label ? piece(from + 1, from + 1 + label.length) : piece(from, from + whole.length);
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return make("span", {}, ...piece(from, from + whole.length));
  return make("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...text);
}
