// The page: conversations, the message field, and who may do what when.

import { reset, set, setting, showControls } from "./controls.js";
import { ask, find, say } from "./dom.js";
import { listKeys } from "./keys.js";
import { MessageView } from "./message.js";
import { close, isOpen, open, panels, toggle } from "./panels.js";
import { models } from "./server.js";
import { Side } from "./side.js";
import * as store from "./store.js";
import { fill, requestOf } from "./talk.js";
import { turnTheme } from "./theme.js";

const STARTERS = ["Explain why the sky is blue, in three sentences.", "Write a haiku about compilers.", "Show me a Python function that reverses a list.", "What should I cook with rice, eggs and spinach?"];

let conversation = store.newConversation();
let views = [];
let running = null; // the AbortController of the answer that is being written
const side = new Side({ open: show, remove });

// ------------------------------------------------------------------------------------------------ conversations
function show(id) {
  stop();
  conversation = (id && store.load(id)) || store.newConversation();
  find("system").value = conversation.system;
  draw();
  side.show(conversation.id);
  close("side");
  find("input").focus();
  find("log").scrollTop = find("log").scrollHeight;
}

function draw() {
  const does = { regenerate, edit };
  views = conversation.messages.map((message, index) => new MessageView(message, index, does));
  find("messages").replaceChildren(...views.map((view) => view.root));
  find("empty").hidden = views.length > 0;
  document.title = conversation.title ? `${conversation.title} · maxstack` : "maxstack";
}

function keep() {
  if (!conversation.messages.length) return;
  try {
    store.save(conversation);
  } catch {
    notice("This browser has no room for more: export what you want to keep, and delete some conversations.");
  }
  side.show(conversation.id);
}

function remove(id, title) {
  const kept = store.load(id);
  store.remove(id);
  if (id === conversation.id) show(null);
  side.show(conversation.id);
  side.offerBack(title, () => { store.save(kept); show(id); });
}

// ------------------------------------------------------------------------------------------------------ talking
function send(text) {
  if (running || !text.trim()) return;
  conversation.messages.push({ role: "user", text });
  conversation.title ||= text.trim().split("\n")[0].slice(0, 60);
  find("input").value = "";
  grow();
  answerIt();
}

function edit(index, text) {
  stop();
  conversation.messages.length = index;
  send(text);
}

function regenerate() {
  if (running || !conversation.messages.length) return;
  if (conversation.messages.at(-1).role === "assistant") conversation.messages.pop();
  answerIt();
}

async function answerIt() {
  const [mine, message, stopper] = [conversation, { role: "assistant", text: "" }, new AbortController()];
  const request = requestOf(mine, find("model").value || undefined);
  mine.messages.push(message);
  running = stopper;
  draw();
  keep();
  busy(true);
  notice("");
  say("Answering");
  const view = views.at(-1);
  const paint = painter(view, message);
  const error = await fill(message, request, stopper.signal, paint);
  if (running === stopper) running = null;
  if (mine === conversation) { view.show(false); follow(); keep(); } else store.save(mine);
  busy(Boolean(running));
  find("rate").textContent = "";
  say(message.failure || `Answer: ${message.text}`);
  if (error?.status === 401) askForKey(error.message);
}

/** Draws as often as the browser can, and follows the end where the reader is there. */
function painter(view, message) {
  let [waiting, saved] = [false, performance.now()];
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      const [began, atEnd] = [performance.now(), nearEnd()];
      if (running && views.includes(view)) {
        view.show(true);
        find("rate").textContent = message.figures;
        if (atEnd) follow();
        if (began - saved > 2000) { saved = began; keep(); }
      }
      // A long answer takes long to draw: leave the browser most of its time.
      setTimeout(() => { waiting = false; }, 3 * (performance.now() - began));
    });
  };
}

function stop() {
  running?.abort();
  running = null;
}

function busy(is) {
  [find("send").hidden, find("stop").hidden] = [is, !is];
  find("messages").setAttribute("aria-busy", String(is));
}

const nearEnd = () => find("log").scrollHeight - find("log").scrollTop - find("log").clientHeight < 80;
const follow = () => { find("log").scrollTop = find("log").scrollHeight; };

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

// ------------------------------------------------------------------------------------------- models, keys, files
async function readModels() {
  try {
    const names = await models();
    find("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === setting("model"))));
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else notice(error.message);
  }
}

function askForKey(text) {
  notice(text);
  open("settings");
  find("key").focus();
}

function exportAll() {
  const blob = new Blob([JSON.stringify(store.everything(), null, 1)], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "conversations.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function importFile(file) {
  try {
    const count = store.take(await file.text());
    side.show(conversation.id);
    say(`${count} conversations imported`);
  } catch (error) {
    notice(`${file.name} was not imported: ${error.message}`);
  }
}

async function deleteAll() {
  if (!(await ask("Delete all conversations of this browser? This cannot be undone.", "Delete all"))) return;
  stop();
  store.list().forEach(({ id }) => store.remove(id));
  show(null);
}

// ------------------------------------------------------------------------------------------------------- wiring
function grow() {
  const input = find("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function step(by) {
  const ids = store.list().map(({ id }) => id);
  const at = ids.indexOf(conversation.id);
  const next = ids[Math.max(0, Math.min(ids.length - 1, at + by))];
  if (next) show(next);
}

function escape() {
  if (running) stop();
  else if (isOpen("settings")) close("settings");
  else close("side");
}

function onInput(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(find("input").value);
}

function wire() {
  const on = (id, what, act) => find(id).addEventListener(what, act);
  on("composer", "submit", (event) => { event.preventDefault(); send(find("input").value); });
  on("input", "input", grow);
  on("input", "keydown", onInput);
  on("stop", "click", () => { stop(); find("input").focus(); });
  on("new", "click", () => show(null));
  on("export", "click", exportAll);
  on("import", "click", () => find("import-file").click());
  on("import-file", "change", (event) => { importFile(event.target.files[0]); event.target.value = ""; });
  on("delete-all", "click", deleteAll);
  on("theme", "click", turnTheme);
  on("help-open", "click", () => find("help").showModal());
  on("model", "change", (event) => set("model", event.target.value));
  on("system", "input", (event) => { conversation.system = event.target.value; keep(); });
  on("reset", "click", reset);
  on("key", "change", (event) => { store.saveKey(event.target.value.trim(), find("key-keep").checked); readModels(); });
  on("key-keep", "change", (event) => store.saveKey(store.key(), event.target.checked));
  for (const name of ["probabilities", "shade"]) on(name, "change", (event) => { set(name, event.target.checked); shade(); });
  addEventListener("pagehide", () => { if (running) keep(); });
  addEventListener("storage", () => side.show(conversation.id));
  listKeys({
    escape, again: regenerate, step, theme: turnTheme,
    fresh: () => show(null),
    settings: () => toggle("settings"),
    help: () => find("help").showModal(),
    edit: () => views.findLast((view) => view.message.role === "user")?.edit(),
  });
}

const shade = () => find("messages").classList.toggle("shaded", find("shade").checked);

function begin() {
  panels();
  showControls();
  find("probabilities").checked = setting("probabilities", true);
  find("shade").checked = setting("shade", false);
  [find("key").value, find("key-keep").checked] = [store.key(), store.keepsKey()];
  shade();
  find("starters").replaceChildren(...STARTERS.map((text) => Object.assign(document.createElement("button"), { textContent: text, onclick: () => send(text) })));
  wire();
  show(store.list()[0]?.id);
  readModels();
}

begin();
