// The list of conversations.

import { find, icon, make, say } from "./dom.js";
import { list } from "./store.js";

export class Side {
  /** `does` has open(id), remove(id, title). */
  constructor(does) {
    this.does = does;
  }

  /** Show all, the one at hand marked. */
  show(current) {
    find("conversations").replaceChildren(...list().map(({ id, title }) => {
      const name = title || "Untitled";
      return make("li", {},
        make("button", { class: "open", type: "button", title: name, "aria-current": String(id === current), onclick: () => this.does.open(id) }, make("span", {}, name)),
        make("button", { class: "icon", type: "button", "aria-label": `Delete ${name}`, title: "Delete", onclick: () => this.does.remove(id, name) }, icon("trash")));
    }));
  }

  /** After a deletion: for some seconds it can be taken back. */
  offerBack(title, restore) {
    const row = make("li", {}, make("button", { class: "open", type: "button", onclick: () => { row.remove(); restore(); } },
      make("span", {}, `Undo: delete ${title}`)));
    find("conversations").prepend(row);
    row.firstChild.focus();
    say(`${title} deleted. Undo is at hand.`);
    setTimeout(() => row.remove(), 8000);
  }
}
