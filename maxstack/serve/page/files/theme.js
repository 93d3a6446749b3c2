// Light and dark: what the system says, until somebody says otherwise.

import { set, setting } from "./controls.js";
import { find } from "./dom.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (setting("theme") ?? (system.matches ? "dark" : "light")) === "dark";

function apply() {
  const chosen = setting("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
  find("theme").setAttribute("aria-pressed", String(isDark()));
}

/** The other one; what the system says anyhow is not remembered. */
export function turnTheme() {
  const wanted = isDark() ? "light" : "dark";
  set("theme", wanted === (system.matches ? "dark" : "light") ? null : wanted);
  apply();
}

system.addEventListener("change", apply);
apply();
