// One answer, from the request to the last token.

import { sampling, setting } from "./controls.js";
import { answer } from "./server.js";
import { placed } from "./tokens.js";

/** What is asked: the conversation up to now. */
export function requestOf(conversation, model) {
  const messages = conversation.messages
    .filter((message) => message.text || message.role === "user")
    .map(({ role, text }) => ({ role, content: text }));
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  const asked = { model, messages, stream: true, stream_options: { include_usage: true }, ...sampling() };
  return setting("probabilities", true) ? { ...asked, logprobs: true, top_logprobs: 5 } : asked;
}

/** Fill `message` as the answer comes, telling `grew` of each piece. Never throws: what went wrong is in the message. */
export async function fill(message, request, signal, grew) {
  const times = { begun: performance.now(), first: 0, last: 0, count: 0 };
  Object.assign(message, { text: "", reasoning: "", tokens: [], figures: "", failure: "" });
  try {
    for await (const event of answer(request, signal)) {
      if (event.usage) times.count = event.usage.completion_tokens ?? times.count;
      for (const choice of event.choices ?? []) add(message, choice, times);
      message.figures = figures(times);
      grew();
    }
    if (!message.text && !message.reasoning) message.failure = "The model ended its answer before it said anything.";
  } catch (error) {
    if (error.name === "AbortError") message.figures = [figures(times), "stopped"].filter(Boolean).join(" · ");
    else message.failure = error.message;
    return error;
  }
  return null;
}

function add(message, choice, times) {
  const delta = choice.delta ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning ?? "";
  const text = delta.content ?? "";
  const entries = choice.logprobs?.content ?? [];
  if (text) message.tokens.push(...placed(entries, message.text.length, text));
  message.text += text;
  message.reasoning += thought;
  if (text || thought) {
    times.last = performance.now();
    times.first ||= times.last;
    times.count += Math.max(entries.length, 1);
  }
  if (choice.finish_reason === "length") message.cut = true;
}

/** Tokens, their rate, and the wait before the first. */
function figures({ begun, first, last, count }) {
  if (!first) return "";
  const seconds = (last - first) / 1e3;
  const rate = count > 1 && seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${count} token${count === 1 ? "" : "s"}${rate} · first after ${((first - begun) / 1e3).toFixed(2)} s`;
}
