// What this browser keeps: an index of conversations, one entry for each of them, settings, perhaps a key.

const INDEX = "maxstack:index";
const ENTRY = "maxstack:conversation:";
const SETTINGS = "maxstack:settings";
const KEY = "maxstack:key";

function read(name, otherwise, storage = localStorage) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // somebody else's, or cut off: begin anew
  }
}

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

export function newConversation() {
  return { id: newId(), title: "", system: "", messages: [], updated: Date.now() };
}

/** Newest first: [{id, title, updated}]. */
export function list() {
  return read(INDEX, []).sort((a, b) => b.updated - a.updated);
}

export function load(id) {
  return read(ENTRY + id, null);
}

/** Keep a conversation. Where the browser has no room, token probabilities go first. Throws when that is not enough. */
export function save(conversation) {
  conversation.updated = Date.now();
  write(conversation);
  const { id, title, updated } = conversation;
  const rest = read(INDEX, []).filter((entry) => entry.id !== id);
  localStorage.setItem(INDEX, JSON.stringify([{ id, title, updated }, ...rest]));
}

function write(conversation) {
  const text = JSON.stringify(conversation);
  try {
    localStorage.setItem(ENTRY + conversation.id, text);
  } catch {
    for (const { id } of read(INDEX, [])) {
      const other = load(id);
      if (other && id !== conversation.id) localStorage.setItem(ENTRY + id, JSON.stringify(slim(other)));
    }
    localStorage.setItem(ENTRY + conversation.id, JSON.stringify(slim(conversation)));
  }
}

function slim(conversation) {
  const messages = conversation.messages.map(({ tokens, ...message }) => message);
  return { ...conversation, messages };
}

export function remove(id) {
  localStorage.removeItem(ENTRY + id);
  localStorage.setItem(INDEX, JSON.stringify(read(INDEX, []).filter((entry) => entry.id !== id)));
}

export function everything() {
  return { format: "maxstack-conversations", version: 1, conversations: list().map(({ id }) => load(id)).filter(Boolean) };
}

/** Take in an exported file; returns how many came. Throws for anything else, having changed nothing. */
export function take(text) {
  const given = JSON.parse(text);
  if (given?.format !== "maxstack-conversations" || !Array.isArray(given.conversations)) {
    throw new Error("this is no file that was exported here");
  }
  const taken = given.conversations.map(checked);
  taken.forEach(save);
  return taken.length;
}

function checked(given) {
  const roles = ["user", "assistant"];
  if (!Array.isArray(given?.messages) || !given.messages.every((m) => roles.includes(m?.role) && typeof m.text === "string")) {
    throw new Error("a conversation in it has no messages");
  }
  const messages = given.messages.map(({ role, text, reasoning, figures }) => ({
    role, text, reasoning: typeof reasoning === "string" ? reasoning : "", figures: typeof figures === "string" ? figures : "",
  }));
  return { ...newConversation(), title: String(given.title ?? "").slice(0, 200), system: String(given.system ?? ""), messages };
}

export const settings = () => read(SETTINGS, {});
export const saveSettings = (values) => localStorage.setItem(SETTINGS, JSON.stringify(values));

/** The API key: of this tab, or, where one says so, of this browser. */
export const key = () => read(KEY, "", sessionStorage) || read(KEY, "");
export function saveKey(value, keep) {
  sessionStorage.setItem(KEY, JSON.stringify(value));
  if (keep && value) localStorage.setItem(KEY, JSON.stringify(value));
  else localStorage.removeItem(KEY);
}
export const keepsKey = () => Boolean(read(KEY, ""));
