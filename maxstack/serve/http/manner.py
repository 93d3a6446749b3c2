"""How a model writes calls and thoughts, and how one whose template has no place for tools is told of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maxstack.chat.parsing import Parser, Style, style_for
from maxstack.chat.parsing.parser import schemas_of
from maxstack.chat.parsing.styles import HERMES
from maxstack.chat.reasoning import tags_of
from maxstack.data.chat import ChatRenderer
from maxstack.data.tokenizer import Tokenizer
from maxstack.serve.constrain.constraint import Constraint
from maxstack.serve.http.thoughts import ThoughtTokens

Message = dict[str, Any]
TOLD = (
    "You can call functions. These are described here, one a line, as JSON:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as JSON, between these tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{…}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Manner:
    """Of one model."""

    style: Style
    """Of calls: that of Hermes where the template is of no known one."""
    thoughts: tuple[str, str] | None
    """The tags of reasoning."""
    has_tools: bool
    """Whether the template has a place for tools. Where it has none they are told of in the system message."""

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> Parser:
        """What takes an answer to a prompt apart."""
        style = self.style if tools else None
        return Parser(style, self.thoughts, prompt=prompt, schemas=schemas_of(tools or []))

    def counter(self, prompt: str, tokenizer: Tokenizer) -> ThoughtTokens:
        """What counts the thoughts of an answer to a prompt."""
        return ThoughtTokens(tokenizer, self.thoughts, prompt)

    def bound(self, form: Constraint, prompt: str) -> Constraint:
        """A form as it binds the answer to a prompt: what is thought before is free."""
        if self.thoughts is None:
            return form
        first, last = self.thoughts
        written = prompt.rstrip()
        if written.endswith(last):  # the template has ended the thoughts: there are none
            return form
        return replace(form, after=last, opening="" if written.endswith(first) else first)


def manner_of(renderer: ChatRenderer, tokenizer: Tokenizer, parser: str | None) -> Manner:
    """By the chat template, or `parser`, the name of a style. Raises UserError for a name that is not known."""
    style = style_for(parser or renderer.template, tokenizer.added_tokens)
    return Manner(style or HERMES, tags_of(renderer.template), renderer.has_tools)


def with_tools_told(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation in plain messages: tools in the system message, calls and their results in the text."""
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    told = TOLD.format(tools=lines)
    first, rest = {"role": "system", "content": ""}, [*messages]
    if rest and rest[0]["role"] in ("system", "developer"):
        first, rest = rest[0], rest[1:]
    text = "\n\n".join(filter(None, [first["content"], told]))
    plain: list[Message] = [{**first, "content": text}]
    for message in rest:
        if message["role"] != "tool":
            plain.append(_called(message))
            continue
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if plain[-1].get("results"):
            plain[-1]["content"] += "\n" + result
        else:
            plain.append({"role": "user", "content": result, "results": True})
    return [{key: value for key, value in one.items() if key != "results"} for one in plain]


def _called(message: Message) -> Message:
    """An assistant's message with its calls as text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    before, between, after = HERMES.written
    texts = [message["content"]] if message.get("content") else []
    for call in calls:
        arguments = call["function"].get("arguments") or {}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        texts.append(f"{before}{call['function']['name']}{between}{arguments}{after}")
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    return rest | {"content": HERMES.joint.join(texts)}
