// A message on the page, and the buttons below it.

import { copy, icon, make } from "./dom.js";
import { Text } from "./text.js";
import { watch } from "./tokens.js";

/** `does` has regenerate(), edit(index, text). */
export class MessageView {
  constructor(message, index, does) {
    [this.message, this.index, this.does] = [message, index, does];
    this.root = make("li", { class: `message ${message.role}` });
    if (message.role === "user") this.#user();
    else this.#assistant();
  }

  #button(name, label, act) {
    return make("button", { class: "icon", type: "button", title: label, "aria-label": label, onclick: act }, icon(name));
  }

  #user() {
    const { message } = this;
    this.root.replaceChildren(
      make("span", { class: "hidden" }, "You:"),
      make("div", { class: "body" }, message.text),
      make("div", { class: "below" },
        this.#button("edit", "Edit and send again", () => this.edit()),
        this.#button("copy", "Copy", (event) => copy(message.text, event.currentTarget))),
    );
  }

  /** Turn a message of the person's into a field. */
  edit() {
    const field = make("textarea", { value: this.message.text, rows: Math.min(12, this.message.text.split("\n").length + 1), "aria-label": "Edit the message" });
    const done = () => { if (field.value.trim()) this.does.edit(this.index, field.value); };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
      if (event.key === "Escape") { event.stopPropagation(); this.#user(); this.root.querySelector("button").focus(); }
    });
    this.root.replaceChildren(make("div", { class: "edit" }, field, make("div", {},
      make("button", { type: "button", onclick: () => this.#user() }, "Cancel"),
      make("button", { type: "button", class: "strong", onclick: done }, "Send"))));
    field.focus();
  }

  #assistant() {
    const { message } = this;
    this.thoughts = new Text();
    this.text = new Text();
    this.count = make("span", {}, "Reasoning");
    this.reasoning = make("details", { class: "reasoning", hidden: true }, make("summary", {}, this.count), this.thoughts.root);
    this.body = make("div", { class: "body", tabIndex: 0, role: "article", "aria-label": "Answer" }, this.text.root);
    this.figures = make("span", { class: "figures" });
    this.failure = make("div", { class: "failure", hidden: true });
    this.below = make("div", { class: "below" },
      this.#button("copy", "Copy the answer", (event) => copy(message.text, event.currentTarget)),
      this.#button("again", "Answer again (Alt+R)", () => this.does.regenerate()),
      this.figures);
    this.root.replaceChildren(make("span", { class: "hidden" }, "Answer:"), this.reasoning, this.body, this.failure, this.below);
    watch(this.body, () => this.message.tokens);
    this.show(false);
  }

  /** Bring the page up to what the message says now. */
  show(writing) {
    const { message } = this;
    this.text.show(message.text, message.tokens);
    this.reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      this.thoughts.show(message.reasoning);
      this.count.textContent = writing && !message.text ? "Thinking …" : "Reasoning";
    }
    this.text.root.classList.toggle("waiting", writing && !message.text);
    this.text.root.classList.toggle("writing", writing && Boolean(message.text));
    this.body.setAttribute("aria-busy", String(writing));
    this.figures.textContent = message.figures ?? "";
    this.below.hidden = writing;
    this.failure.hidden = !message.failure;
    if (message.failure) {
      this.failure.replaceChildren(make("span", {}, message.failure),
        make("button", { type: "button", onclick: () => this.does.regenerate() }, "Try again"));
    }
  }
}
