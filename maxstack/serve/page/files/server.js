// Talking with the server, by the same routes as any other client.

import { key } from "./store.js";

/** What the server said, for people; `status` 0 is that it was not reached. */
export class ServerError extends Error {
  constructor(message, status, after = 0) {
    super(message);
    this.status = status;
    this.after = after;
  }
}

function headers() {
  const own = key();
  return own ? { authorization: `Bearer ${own}` } : {};
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const after = Number(response.headers.get("retry-after")) || 0;
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    said = `The server answered with status ${response.status}`;
  }
  if (response.status === 401) said = "This server wants an API key: give it in the settings.";
  if (response.status === 429 && after) said = `The server is busy. Try again in ${after} s.`;
  return new ServerError(said, response.status, after);
}

/** Names of the models that can be asked. */
export async function models() {
  const response = await reach("v1/models", { headers: headers() });
  return (await response.json()).data.map((model) => model.id);
}

/** Ask for an answer; yields the events of the stream. Throws ServerError, or AbortError when `signal` says stop. */
export async function* answer(request, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  let done = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") { done = true; break; }
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message ?? "The server failed while it answered", 500);
    yield event;
  }
  if (!done) throw new ServerError("The connection broke off in the middle of the answer.", 0);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r", "");
      const whole = rest.split("\n\n");
      rest = whole.pop();
      for (const event of whole) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trim()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke off in the middle of the answer.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
