// How tokens are chosen. A setting that nobody touched is not sent: the server's default holds.

import { find, make } from "./dom.js";
import { saveSettings, settings } from "./store.js";

const CONTROLS = [
  { name: "temperature", label: "Temperature", least: 0, most: 2, step: 0.05, usual: 1 },
  { name: "top_p", label: "Top p", least: 0.01, most: 1, step: 0.01, usual: 1 },
  { name: "top_k", label: "Top k", least: 0, most: 200, step: 1, usual: 0 },
  { name: "min_p", label: "Min p", least: 0, most: 1, step: 0.01, usual: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", least: 0.5, most: 2, step: 0.05, usual: 1 },
  { name: "max_tokens", label: "Most tokens", least: 1, most: 131072, step: 1, plain: true },
  { name: "seed", label: "Seed", least: 0, most: 4294967295, step: 1, plain: true },
];

const values = settings();
const chosen = values.sampling ?? {};
const keep = () => saveSettings({ ...values, sampling: chosen });

/** The fields of a request that were set. */
export const sampling = () => ({ ...chosen });
export const setting = (name, otherwise) => values[name] ?? otherwise;
export function set(name, value) {
  values[name] = value;
  keep();
}

function control({ name, label, least, most, step, usual, plain }) {
  const id = `set-${name}`;
  const range = { min: least, max: most, step };
  const number = make("input", { id, type: "number", placeholder: "default", ...range, value: chosen[name] ?? "" });
  const slider = plain ? null : make("input", { type: "range", "aria-label": label, ...range, value: chosen[name] ?? usual });
  const take = (text) => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value)) delete chosen[name];
    else chosen[name] = Math.min(most, Math.max(least, step === 1 ? Math.round(value) : value));
    keep();
  };
  number.addEventListener("input", () => {
    take(number.value);
    if (slider) slider.value = chosen[name] ?? usual;
  });
  number.addEventListener("change", () => { number.value = chosen[name] ?? ""; });
  slider?.addEventListener("input", () => { number.value = slider.value; take(slider.value); });
  return make("div", { class: "control" }, make("label", { htmlFor: id }, label), number, slider);
}

export function showControls() {
  find("controls").replaceChildren(...CONTROLS.map(control));
}

export function reset() {
  for (const name of Object.keys(chosen)) delete chosen[name];
  keep();
  showControls();
}
