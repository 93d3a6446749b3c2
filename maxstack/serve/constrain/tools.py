"""Calls of tools as a grammar, in the words of the model's own template."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxstack.chat.parsing import Style, style_for
from maxstack.chat.parsing.bodies import NAME, JsonBody
from maxstack.chat.parsing.parser import schemas_of
from maxstack.chat.parsing.tagged import is_text
from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.serve.constrain.constraint import BadConstraint, Bounds
from maxstack.serve.constrain.schema import checked_schema
from maxstack.serve.constrain.writing import ANYTHING, STYLE, quoted, special_tokens, up_to, written

BARELY = r"/([^{](.|\n)*)?/"
"""Text that is no call where calls have no mark."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCalls:
    """The value of a "tools" constraint."""

    style: str
    """A name of `maxstack.chat.parsing.STYLES`."""
    tools: Sequence[Mapping[str, Any]]
    """As OpenAI's interface has them: those that may be called, the one that must be where there is one."""
    required: bool = True
    """At least one call and nothing else. False: text, and calls whose arguments fit where there are some."""
    parallel: bool = True
    """Several calls may follow each other."""

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**dataclasses.asdict(self), "tools": list(self.tools)}


def tool_rules(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    """The grammar, in Lark. Raises BadConstraint."""
    if not isinstance(value, ToolCalls):
        raise BadConstraint(f"tools: the value is {type(value).__name__}; it must be ToolCalls")
    try:
        style, schemas = style_for(value.style), schemas_of(value.tools) or {}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        raise BadConstraint(f"tools: {error}") from error
    if style is None or not schemas or len(schemas) > bounds.tools:
        raise BadConstraint(
            f"tools: there are {len(schemas)} tools; 1 to {bounds.tools} of a known style may be"
        )
    rules = Rules(tokenizer, style, bounds)
    opened = not value.required and not style.bare
    calls = [rules.call(name, schema, opened=opened) for name, schema in schemas.items()]
    rules.add("call", " | ".join(calls))
    start = rules.required(value.parallel) if value.required else rules.optional(value.parallel)
    return "\n".join([f"start: {start}", *rules.lines])


class Rules:
    """Collects the rules of a grammar."""

    def __init__(self, tokenizer: Tokenizer, style: Style, bounds: Bounds):
        self.lines: list[str] = []
        self._style, self._bounds = style, bounds
        self._special = special_tokens(tokenizer, style.marks)

    def add(self, name: str, body: str) -> str:
        """Another rule; its name."""
        self.lines.append(f"{name}: {body}")
        return name.partition("[")[0]

    def text(self, text: str) -> str:
        """A text, with special tokens as such."""
        return written(text, self._special)

    def call(self, name: str, schema: Any, *, opened: bool) -> str:
        """The rule of one tool's call, without what opens it where that has come."""
        if not NAME.fullmatch(name):
            raise BadConstraint(f"tools: {name!r} is no name for a function")
        before, between, after = self._style.written
        before = before.removeprefix(self._style.opens[0]) if opened else before
        schema = {"type": "object"} | checked_schema(schema or {}, self._bounds)
        write: Callable[[str, dict[str, Any]], str] = (
            self._object if self._style.body is JsonBody else self._tags
        )
        own = f"tool_{len(self.lines)}"
        body = write(own, schema)
        return self.add(own, f"{self.text(before + name + between)} {body} {self.text(after)}")

    def _object(self, own: str, schema: dict[str, Any]) -> str:
        return self._json(schema)

    def _json(self, schema: Any) -> str:
        return "%json " + json.dumps({**schema, "x-guidance": STYLE}, allow_nan=False)

    def _tags(self, own: str, schema: dict[str, Any]) -> str:
        """Tags of parameters in the schema's order; those that are not required may be left out."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping):
            raise BadConstraint("tools: properties must be an object")
        parts = []
        for i, (key, kind) in enumerate(properties.items()):
            if not NAME.fullmatch(key):
                raise BadConstraint(f"tools: {key!r} is no name for a parameter")
            value, end = f"{own}_{i}", quoted("\n</parameter>\n")
            if is_text(kind) and not (isinstance(kind, Mapping) and "enum" in kind):
                self.add(f"{value}[lazy]", f"{ANYTHING} {end}")
            elif is_text(kind):
                self.add(value, f"({' | '.join(quoted(str(one)) for one in kind['enum'])}) {end}")
            else:
                self.add(value, f"{self._json(kind)} {end}")
            part = f"{quoted(f'<parameter={key}>' + chr(10))} {value}"
            parts.append(part if key in required else f"({part})?")
        return " ".join(parts)

    def required(self, parallel: bool) -> str:
        """Calls and nothing else."""
        return f"call ({self.text(self._style.joint)} call)*" if parallel else "call"

    def optional(self, parallel: bool) -> str:
        """Text, in which what opens a call goes on as one."""
        if self._style.bare:
            return f"{self.required(parallel)} | {self.add('FREE', BARELY)}"
        self.add("TEXT", ANYTHING)
        self.lines.append(up_to(self.text(self._style.opens[0])))
        self.add("called", "lead call")
        return "called* TEXT" if parallel else "called | TEXT"
