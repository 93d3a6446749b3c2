// What slides in: the list of conversations on a narrow screen, the settings on any.

import { find } from "./dom.js";

const narrow = matchMedia("(max-width: 820px)");

export const isOpen = (name) => find(name).classList.contains("open");

function update() {
  for (const name of ["side", "settings"]) {
    const shown = isOpen(name) || (name === "side" && !narrow.matches);
    find(name).inert = !shown;
    find(`${name}-open`).setAttribute("aria-expanded", String(shown));
  }
  find("veil").hidden = !(narrow.matches && (isOpen("side") || isOpen("settings")));
}

export function open(name) {
  find(name).classList.add("open");
  update();
  if (name === "settings") find("settings-close").focus();
  else find("new").focus();
}

export function close(name) {
  if (!isOpen(name)) return;
  const inside = find(name).contains(document.activeElement);
  find(name).classList.remove("open");
  update();
  if (inside) find(`${name}-open`).focus();
}

export const toggle = (name) => (isOpen(name) ? close(name) : open(name));

export function panels() {
  for (const name of ["side", "settings"]) {
    find(`${name}-open`).addEventListener("click", () => toggle(name));
    find(`${name}-close`).addEventListener("click", () => close(name));
  }
  find("veil").addEventListener("click", () => { close("side"); close("settings"); });
  narrow.addEventListener("change", update);
  update();
}
