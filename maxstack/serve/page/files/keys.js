// Keys that work everywhere on the page.

import { find } from "./dom.js";

const typing = (element) => element?.matches?.("input, textarea, select") ?? false;

/** `does` names what the keys do: escape, again, step(by), theme, fresh, settings, help, edit. */
export function listKeys(does) {
  const withAlt = {
    KeyN: does.fresh, KeyR: does.again, KeyS: does.settings, KeyT: does.theme, KeyE: does.edit,
    ArrowUp: () => does.step(-1), ArrowDown: () => does.step(1),
  };
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") return does.escape();
    if (event.altKey && !event.ctrlKey && !event.metaKey && withAlt[event.code]) {
      event.preventDefault();
      return withAlt[event.code]();
    }
    if (typing(document.activeElement) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); find("input").focus(); }
    if (event.key === "?") { event.preventDefault(); does.help(); }
  });
}
