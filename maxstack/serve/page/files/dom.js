// Elements are built, never parsed: whatever a model or a person wrote becomes text nodes.

export const find = (id) => document.getElementById(id);

/** An element. `props` are properties, `on…` listeners, `class`, `data` and attributes with a dash. */
export function make(name, props = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (key === "class") element.className = value;
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Tell those who listen instead of looking. */
export function say(text) {
  find("said").textContent = text;
}

/** A yes-or-no question in a dialog. */
export function ask(text, yes) {
  const dialog = find("ask");
  find("ask-text").textContent = text;
  find("ask-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true });
  });
}

export async function copy(text, button) {
  const label = button.querySelector("span") ?? null;
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
    if (label) label.textContent = "Copied";
  } catch {
    say("The browser does not let this page copy");
    if (label) label.textContent = "Not allowed";
  }
  if (label) setTimeout(() => { label.textContent = "Copy"; }, 1500);
}
