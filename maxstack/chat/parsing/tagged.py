"""Calls as tags: <function=f> <parameter=city> Zürich </parameter> </function>, as Qwen3-Coder writes them."""

import json
from collections.abc import Mapping
from typing import Any

from maxstack.chat.parsing.bodies import BAD, NAME, NOTHING, Said
from maxstack.chat.parsing.json_value import BLANK

FUNCTION, PARAMETER = "<function=", "<parameter="
PARAMETER_END, FUNCTION_END = "</parameter>", "</function>"


class TaggedBody:
    """The tags of one call. A parameter is text where its schema says so, or says nothing; else JSON."""

    def __init__(self, schemas: Mapping[str, Any]):
        self._schemas = schemas
        self._held = ""
        self._want = "function"  # function, name, parameter, key, value
        self._types: Mapping[str, Any] = {}
        self._keys: set[str] = set()
        self._text = self._fresh = False

    def push(self, char: str) -> Said:
        """Take the next character."""
        self._held += char
        return getattr(self, f"_{self._want}")()

    def end(self) -> str:
        """What was held back of a text because it might have been its end."""
        return escaped(self._held) if self._want == "value" and self._text else ""

    def _function(self) -> Said:
        return self._tag({FUNCTION: "name"})

    def _tag(self, tags: Mapping[str, str]) -> Said:
        """One of some tags, after blanks."""
        found = self._held.lstrip(BLANK)
        if found in tags:
            self._held, self._want = "", tags[found]
            return NOTHING
        return NOTHING if any(tag.startswith(found) for tag in tags) else BAD

    def _name(self) -> Said:
        name, closed = self._named()
        if not closed:
            return NOTHING if name else BAD
        schema = self._schemas.get(name) or {}
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._types = properties if isinstance(properties, Mapping) else {}
        self._want = "parameter"
        return Said(name, "{")

    def _named(self) -> tuple[str, bool]:
        """A name up to the end of its tag, and whether that has come; "" for none."""
        name, closed = self._held.removesuffix(">"), self._held.endswith(">")
        if not NAME.fullmatch(name):
            return "", False
        if closed:
            self._held = ""
        return name, closed

    def _parameter(self) -> Said:
        said = self._tag({PARAMETER: "key", FUNCTION_END: "function"})
        if self._want == "function":
            return Said(arguments="}", done=True)
        return said

    def _key(self) -> Said:
        key, closed = self._named()
        if not closed:
            return NOTHING if key else BAD
        if key in self._keys:
            return BAD
        before = ", " if self._keys else ""
        self._keys.add(key)
        self._want, self._fresh, self._text = "value", True, is_text(self._types.get(key))
        return Said(arguments=f"{before}{json.dumps(key, ensure_ascii=False)}: " + '"' * self._text)

    def _value(self) -> Said:
        if self._fresh and self._held == "\n":  # the tag's, not the value's
            self._held, self._fresh = "", False
            return NOTHING
        self._fresh = False
        if self._held.endswith(PARAMETER_END):
            value = self._held.removesuffix(PARAMETER_END).removesuffix("\n")
            self._held, self._want = "", "parameter"
            return Said(arguments=escaped(value) + '"' if self._text else as_json(value))
        if not self._text:
            return NOTHING
        end = "\n" + PARAMETER_END
        most = min(len(end) - 1, len(self._held))
        keep = next((n for n in range(most, 0, -1) if self._held.endswith((end[:n], PARAMETER_END[:n]))), 0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return Said(arguments=escaped(sure))


def is_text(schema: Any) -> bool:
    """Whether a parameter of this schema is written as it is."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind)


def escaped(text: str) -> str:
    """As JSON writes it inside of quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def as_json(text: str) -> str:
    """A value that is not text; where it is no JSON, as a text all the same."""
    spelled = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        json.loads(spelled, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return spelled


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
