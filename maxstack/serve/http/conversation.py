"""Messages to the prompt that the model reads, by the repository's one renderer."""

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Any

from maxstack.chat.parsing import Parser
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.http.errors import refused
from maxstack.serve.http.front import LONG, Front
from maxstack.serve.http.manner import with_tools_told
from maxstack.serve.http.schemas.chat import ChatRequest, Message
from maxstack.serve.http.thoughts import ThoughtTokens

RESERVED = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "supervise", "trust_assistant",
})  # fmt: skip
"""What a template is told of the renderer's own."""


@dataclass
class Prompt:
    """A conversation as the model reads it."""

    front: Front
    ids: list[int]
    text: str
    tools: list[dict[str, Any]] | None
    """Those that may be called."""

    def ended(self, params: SamplingParams) -> SamplingParams:
        """Parameters that end an answer where the template ends it."""
        ends = self.front.ends
        ids = () if params.ignore_eos else tuple(ends.ids)
        return dataclasses.replace(
            params,
            stop=(*params.stop, *ends.texts),
            stop_token_ids=tuple(dict.fromkeys([*params.stop_token_ids, *ids])),
        )

    def parser(self) -> Parser:
        """What takes an answer to it apart."""
        return self.front.manner.parser(self.text, self.tools)

    def counter(self) -> ThoughtTokens:
        """What counts its thoughts."""
        return self.front.manner.counter(self.text, self.front.tokenizer)


async def render(front: Front, asked: ChatRequest) -> Prompt:
    """The prompt of a request. Raises for messages that the template has no place for."""
    renderer = front.renderer
    messages = [plain_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)]
    if "developer" not in renderer.template:  # OpenAI's newer name for the same
        messages = [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]
    going_on = bool(asked.continue_final_message)
    opening = not going_on if asked.add_generation_prompt is None else asked.add_generation_prompt
    variables: dict[str, Any] = dict(asked.chat_template_kwargs or {})
    if taken := sorted(RESERVED & {*variables}):
        raise refused(
            f"chat_template_kwargs: {taken[0]} is no variable of the template's own", "chat_template_kwargs"
        )
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
        if asked.reasoning_effort == "none":  # as other templates have it
            variables.setdefault("enable_thinking", False)
    tools = None
    if asked.tools and asked.tool_choice != "none":
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
    placed = front.manner.has_tools or not tools
    if not placed:
        messages = with_tools_told(messages, tools or [])
    options: dict[str, Any] = {
        "tools": tools if placed else None, "documents": asked.documents, "add_generation_prompt": opening,
        "continue_final_message": going_on, **variables,
    }  # fmt: skip
    size = sum(len(str(message)) for message in messages) + len(str(tools or ""))
    if size > LONG:
        rendered = await asyncio.to_thread(renderer, messages, **options)
    else:
        rendered = renderer(messages, **options)
    return Prompt(front, rendered.ids, rendered.text, tools)


def plain_message(message: Message, where: str) -> dict[str, Any]:
    """As the renderer takes it. Raises for content that is no text."""
    plain: dict[str, Any] = {"role": message.role}
    content = message.content
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            if part.type == "refusal" and part.refusal is not None:
                texts.append(part.refusal)
            elif part.type in ("text", "input_text", "output_text") and part.text is not None:
                texts.append(part.text)
            else:
                place = f"{where}.content[{i}]"
                raise refused(
                    f"{place} is of type {part.type!r}: this model reads text only, in parts "
                    '{"type": "text", "text": …}',
                    place,
                    "unsupported_content",
                )
        content = "".join(texts)
    if message.audio is not None or message.function_call is not None:
        raise refused(
            f"{where} has audio or function_call, which are not supported; calls go in tool_calls", where
        )
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if message.role == "assistant":
        content = content if content is not None or message.tool_calls else message.refusal or ""
        if reasoning:
            plain["reasoning_content"] = reasoning
        if message.tool_calls:
            plain["tool_calls"] = [
                call.model_dump(exclude_none=True, exclude={"index"}) for call in message.tool_calls
            ]
    elif message.tool_calls or reasoning:
        raise refused(
            f"{where}: tool_calls and reasoning are an assistant's; its role is {message.role}", where
        )
    plain["content"] = content
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            plain[key] = getattr(message, key)
    return plain
