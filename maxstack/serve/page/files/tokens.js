// Tokens of an answer with their probabilities: where each stands in the text, and the small table beside it.

import { find, make, say } from "./dom.js";

/** Tokens of one event, placed in the text that it added: [start, end, token, logprob, [[token, logprob], …]]. */
export function placed(entries, from, text) {
  const end = from + text.length;
  let at = from;
  const found = [];
  for (const { token, logprob, top_logprobs: top } of entries) {
    const fits = token && text.startsWith(token, at - from);
    const next = fits ? at + token.length : at;
    found.push([at, next, token, round(logprob), (top ?? []).map((other) => [other.token, round(other.logprob)])]);
    at = next;
  }
  // Parts of a character, spaces that the text leaves out: what is left over belongs to the last token.
  if (found.length && at < end) found.at(-1)[1] = end;
  return found.filter(([start, stop]) => stop > start);
}

const round = (logprob) => Math.round((logprob ?? -99) * 1e3) / 1e3;
const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

/** How sure the model was, in five steps, for shading. */
export const sureness = (logprob) => [0.2, 0.4, 0.65, 0.9].filter((limit) => Math.exp(logprob) >= limit).length;

/** Show the table of a token's element; null hides it. */
export function tell(element, tokens) {
  const tip = find("tip");
  document.querySelector(".token.at")?.classList.remove("at");
  const token = element && tokens?.[Number(element.dataset.i)];
  tip.hidden = !token;
  if (!token) return;
  const [, , own, logprob, top] = token;
  const rows = top.some(([other]) => other === own) ? top : [[own, logprob], ...top];
  tip.replaceChildren(make("table", {}, ...rows.map(([other, its]) => make(
    "tr", { class: other === own ? "own" : "" },
    make("td", {}, visible(other)),
    make("td", {}, make("meter", { value: Math.exp(its), "aria-hidden": "true" })),
    make("td", {}, percent(its)),
  ))));
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const above = box.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

/** Hover and arrow keys over a message's body. */
export function watch(body, tokensOf) {
  const over = (event) => tell(event.target.closest?.(".token") ?? null, tokensOf());
  body.addEventListener("pointerover", over);
  body.addEventListener("click", over);
  body.addEventListener("pointerleave", () => tell(null));
  body.addEventListener("blur", () => tell(null));
  body.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target !== body || event.altKey || event.ctrlKey || event.metaKey) return;
    const all = [...body.querySelectorAll(".token")];
    if (!all.length) return;
    event.preventDefault();
    const at = all.indexOf(body.querySelector(".token.at"));
    const next = all[Math.max(0, Math.min(all.length - 1, at + step))];
    next.scrollIntoView({ block: "nearest" });
    tell(next, tokensOf());
    next.classList.add("at");
    const [, , token, logprob] = tokensOf()[Number(next.dataset.i)];
    say(`${visible(token)}, ${percent(logprob)}`);
  });
}
