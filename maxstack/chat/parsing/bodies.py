"""What stands inside of a call: an object with name and arguments, or tags for each of them.

A body takes one character after another and says what it means. Nothing is said before the call is certain to be one:
its name is known, and its arguments have begun. Until then it may turn out to be text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from maxstack.chat.parsing.json_value import BLANK, Came, JsonValue

NAME = re.compile(r"[\w.:/-]{1,128}")
ARGUMENTS = ("arguments", "parameters")


class Said(NamedTuple):
    """What a character has made known."""

    name: str | None = None
    arguments: str = ""
    done: bool = False
    """The body is complete; this character was its last."""
    bad: bool = False
    """It is none, or goes wrong here; this character is not part of it."""


NOTHING = Said()
BAD = Said(bad=True)


@runtime_checkable
class Body(Protocol):
    """The inside of a call."""

    def push(self, char: str) -> Said:
        """Take the next character."""
        ...

    def end(self) -> str:
        """Arguments that were held back, where the text ends inside of the call."""
        ...


class JsonBody:
    """{"name": "f", "arguments": {…}}, in any order, the second under one of its two names."""

    def __init__(self, schemas: Mapping[str, Any]):
        self._want = "object"  # object, key or }, key, colon, value, comma
        self._value: JsonValue | None = None
        self._raw = ""  # of the string or value that is being read
        self._key = ""
        self._name: str | None = None
        self._arguments = ""  # not said yet
        self._begun = self._certain = self._plain = False
        self._keys: set[str] = set()

    def push(self, char: str) -> Said:
        """Take the next character."""
        if self._value is not None:
            came = self._value.push(char)
            if came is Came.BAD:
                return BAD
            if came is not Came.PAST:
                self._raw += char
                if self._plain:
                    self._arguments += char
                if came is Came.LAST and not self._complete():
                    return BAD
                return self._said()
            if not self._complete():
                return BAD
        return self._structure(char)

    def end(self) -> str:
        """Nothing is held back once the call is certain."""
        return ""

    def _structure(self, char: str) -> Said:
        if char in BLANK:
            return NOTHING
        want, self._want = self._want, ""
        if want == "object" and char == "{":
            self._want = "key or }"
        elif want in ("key", "key or }") and char == '"':
            self._read(char, "colon")
        elif want == "colon" and char == ":":
            self._want = "value"
        elif want == "value":
            return self._begin(char)
        elif want == "comma" and char == ",":
            self._want = "key"
        elif want == "comma" and char == "}" and self._name is not None:
            return self._close()
        else:
            return BAD
        return NOTHING

    def _close(self) -> Said:
        if not self._begun:
            self._arguments, self._begun = "{}", True
        return self._said()._replace(done=True)

    def _read(self, char: str, then: str) -> bool:
        self._value, self._raw, self._want = JsonValue(), char, then
        return self._value.push(char) is not Came.BAD

    def _begin(self, char: str) -> Said:
        argument = self._key in ARGUMENTS
        if argument:
            if self._begun or char not in '{"n':
                return BAD
            self._plain = char == "{"
            if self._plain:
                self._begun, self._arguments = True, char
        return self._said() if self._read(char, "comma") else BAD

    def _complete(self) -> bool:
        """The string or value that was read is whole; False if it cannot be what it should."""
        raw, self._value, plain, self._plain = self._raw, None, self._plain, False
        if self._want == "colon":
            self._key = json.loads(raw)
            fresh = self._key not in self._keys
            self._keys.add(self._key)
            return fresh
        if self._key == "name":
            name = json.loads(raw)
            self._name = name if isinstance(name, str) and NAME.fullmatch(name) else None
            return self._name is not None
        if self._key in ARGUMENTS and not plain:
            self._begun, self._arguments = True, arguments_of(raw)
            return bool(self._arguments)
        return True

    def _said(self) -> Said:
        if not self._begun or self._name is None:
            return NOTHING
        name, self._certain = None if self._certain else self._name, True
        arguments, self._arguments = self._arguments, ""
        return Said(name, arguments)


def arguments_of(raw: str) -> str:
    """Arguments that were written as a text of JSON, or as null; "" for others."""
    value = json.loads(raw)
    if value is None:
        return "{}"
    try:
        fits = isinstance(value, str) and isinstance(json.loads(value), dict) and value.encode() != b""
    except (ValueError, RecursionError):  # half of a surrogate pair included
        return ""
    return value if fits else ""
