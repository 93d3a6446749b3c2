"""Messages in the shape that OpenAI's API gave them, checked and made plain."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.data.chat.template import plain_data
from maxstack.data.tokenizer import well_formed

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning goes; the first is ours, the others are taken for it."""
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
_PARTS_REFUSED = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, with content as text (or None beside tool calls) and arguments as objects.

    Raises UserError that names the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise UserError("there are no messages: at least one is needed")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where} has role {role!r}; roles are {', '.join(ROLES)}")
    unknown = sorted(map(str, {key for key, value in message.items() if value is not None} - {*_KEYS}))
    if unknown:
        raise UserError(
            f"{where} has {', '.join(unknown)}, which is not supported; keys are {', '.join(_KEYS)}"
        )
    calls = _calls(message.get("tool_calls"), role, f"{where}.tool_calls")
    checked: dict[str, Any] = {"role": role, "content": _content(message, calls, where)}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            checked[key] = _text(message[key], f"{where}.{key}")
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if reasoning is not None:
        if role != "assistant":
            raise UserError(f"{where} has reasoning, which only an assistant has; its role is {role}")
        # GPT-OSS's template reads "thinking"; transformers gives both names as well.
        checked |= dict.fromkeys(
            ("reasoning_content", "thinking"), _text(reasoning, f"{where}.reasoning_content")
        )
    if calls:
        checked["tool_calls"] = calls
    return checked


def _content(message: Message, calls: Sequence[Any], where: str) -> str | None:
    content = message.get("content")
    if content is None:
        if calls:
            return None
        raise UserError(f"{where} has no content; give it a text, which may be empty")
    if isinstance(content, str):
        return well_formed(content)
    if not isinstance(content, Sequence):
        raise UserError(f"{where}.content must be text, not {type(content).__name__}")
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text"):
        return _text(part.get("text"), f"{where}.text")
    if kind in _PARTS_REFUSED:
        raise UserError(f"{where} is {kind}: only text is supported in messages")
    raise UserError(f'{where} must be {{"type": "text", "text": …}}, got {_short(part)}')


def _calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if calls is None or calls == []:
        return []
    if role != "assistant":
        raise UserError(f"{where}: only an assistant calls tools; the role is {role}")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise UserError(f"{where} must be a list of calls, not {type(calls).__name__}")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(
            f'{where} must be {{"type": "function", "function": {{"name", "arguments"}}}}, got {_short(call)}'
        )
    if call.get("type", "function") != "function":
        raise UserError(f"{where} has type {call['type']!r}; only function is supported")
    named = {} if call.get("id") is None else {"id": _text(call["id"], f"{where}.id")}
    arguments = _arguments(function, where)
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    where = f"{where}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): {_short(arguments)}") from error
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where} must be a JSON object, got {_short(arguments)}")
    return plain_data(arguments, where)


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copies of function schemas as {"type": "function", "function": {"name", …}}; None for no tools.

    Raises UserError that names the tool and what is wrong with it.
    """
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise UserError(f"tools must be a list of function schemas, not {type(tools).__name__}")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(
            f'{where} must be {{"type": "function", "function": {{"name", "description", "parameters"}}}}, '
            f"got {_short(tool)}"
        )
    if tool is not function and tool.get("type", "function") != "function":
        raise UserError(f"{where} has type {tool['type']!r}; only function is supported")
    whole = {"type": "function", "function": tool} if tool is function else tool
    return plain_data(whole if "type" in whole else {"type": "function", **whole}, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, got {_short(value)}")
    return well_formed(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
