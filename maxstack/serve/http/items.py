"""Between the items of /v1/responses and the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from maxstack.serve.http.errors import refused, validation_error
from maxstack.serve.http.schemas.chat import ChatRequest
from maxstack.serve.http.schemas.responses import ContentPart, Item, ResponsesRequest

SAME = (
    "model", "temperature", "top_p", "top_logprobs", "parallel_tool_calls", "stream", "seed", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "priority",
    "timeout_s", "chat_template_kwargs",
)  # fmt: skip
"""Fields that a chat has under the same name and with the same bounds."""
LOGPROBS = "message.output_text.logprobs"
STATE = "nothing is stored between requests here: send the conversation's items whole, as input"


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The chat that a request amounts to. Raises for what would need a memory of earlier ones."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(asked, name) is not None:
            raise refused(f"{name} is not supported: {STATE}", name, "unsupported_parameter")
    messages = messages_of(asked.input)
    if asked.instructions:
        messages = [{"role": "system", "content": asked.instructions}, *messages]
    chat: dict[str, Any] = {name: value for name in SAME if (value := getattr(asked, name)) is not None}
    chat |= {"messages": messages, "logprobs": wants_logprobs(asked) or None}
    if not chat["logprobs"]:
        chat.pop("top_logprobs", None)
    if asked.max_output_tokens is not None:
        chat["max_completion_tokens"] = asked.max_output_tokens
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        chat["reasoning_effort"] = asked.reasoning.effort
    if asked.tools:
        plain = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        chat["tools"] = [{"type": tool.pop("type"), "function": tool} for tool in plain]
    if isinstance(asked.tool_choice, str):
        chat["tool_choice"] = asked.tool_choice
    elif asked.tool_choice is not None:
        chat["tool_choice"] = {"type": "function", "function": {"name": asked.tool_choice.name}}
    if asked.text is not None and asked.text.format is not None:
        form = asked.text.format.model_dump(exclude_none=True, by_alias=True)
        kind = form.pop("type")
        chat["response_format"] = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else {})
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as error:
        raise validation_error([{**e, "loc": ("body", *e["loc"])} for e in error.errors()], chat) from None


def wants_logprobs(asked: ResponsesRequest) -> bool:
    """Whether text comes with its tokens' log-probabilities."""
    return LOGPROBS in (asked.include or ()) or bool(asked.top_logprobs)


def messages_of(items: str | Sequence[Item]) -> list[dict[str, Any]]:
    """Items as messages: what an assistant thought, said and called in one turn is one message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if item.type == "message" and item.role != "assistant":
            if item.role is None:
                raise refused(f"{where} has no role", f"{where}.role", "missing_required_parameter")
            turn = None
            messages.append({"role": item.role, "content": text_of(item.content, where)})
        elif item.type == "function_call_output":
            turn = None
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": needed(item.call_id, where, "call_id"),
                    "content": text_of(item.output, where),
                }
            )
        else:
            if turn is None or (item.type == "message" and turn["content"] is not None):
                turn = {"role": "assistant", "content": None}
                messages.append(turn)
            add_to_turn(turn, item, where)
    for message in messages:
        if message["role"] == "assistant" and message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def add_to_turn(turn: dict[str, Any], item: Item, where: str) -> None:
    """An item of the assistant's as part of its message."""
    if item.type == "message":
        turn["content"] = text_of(item.content, where)
    elif item.type == "function_call":
        function = {
            "name": needed(item.name, where, "name"),
            "arguments": needed(item.arguments, where, "arguments"),
        }
        call = {"id": needed(item.call_id, where, "call_id"), "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else []
        thoughts = [part.text for part in parts if part.type == "reasoning_text" and part.text]
        if thoughts:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(thoughts)
    else:
        raise refused(
            f"{where} is of type {item.type!r}: message, function_call, function_call_output and reasoning are "
            "supported",
            f"{where}.type",
            "unsupported_value",
        )


def needed(value: str | None, where: str, name: str) -> str:
    """A field that this kind of item must have."""
    if value is None:
        raise refused(f"{where} has no {name}", f"{where}.{name}", "missing_required_parameter")
    return value


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """Content as text. Raises for parts that are none."""
    if content is None:
        raise refused(f"{where} has no content", where, "missing_required_parameter")
    if isinstance(content, str):
        return content
    texts = []
    for j, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("input_text", "output_text", "text", "refusal") or text is None:
            place = f"{where}.content[{j}]"
            raise refused(
                f"{place} is of type {part.type!r}: this model reads text only", place, "unsupported_content"
            )
        texts.append(text)
    return "".join(texts)
