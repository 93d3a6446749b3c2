"""One JSON value, checked character by character: whether what has come can still become one."""

import re
from enum import Enum

BLANK = " \t\n\r"
MOST_DEEP = 64
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_SO_FAR = re.compile(
    r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?|[0-9]*)|[eE][+-]?[0-9]*)?)?"
)
_WORDS = {"t": "true", "f": "false", "n": "null"}


class Came(Enum):
    """What a character means for the value."""

    MORE = 0
    """It belongs to the value."""
    LAST = 1
    """It ends the value."""
    PAST = 2
    """The value, a number, had ended before it."""
    BAD = 3
    """It cannot stand here."""


class JsonValue:
    """Takes the characters of a value, the first of them not blank."""

    def __init__(self):
        self._open: list[str] = []  # brackets
        self._want = "value"  # value, value or ], key, key or }, colon, comma
        self._inside = ""  # string, escape, hex, number, word
        self._so_far = ""  # of a number or a word
        self._hex = 0

    def push(self, char: str) -> Came:
        """Take the next character."""
        if self._inside:
            came = self._token(char)
            if came is not Came.PAST or not self._open:
                return came
        return self._structure(char)

    def _structure(self, char: str) -> Came:
        if char in BLANK:
            return Came.MORE if self._open else Came.BAD
        if char in "]}":
            return self._close(char)
        want, self._want = self._want, ""
        if want in ("value", "value or ]"):
            return self._begin(char)
        if want in ("key", "key or }") and char == '"':
            self._inside, self._want = "string", "colon"
            return Came.MORE
        if want == "colon" and char == ":":
            self._want = "value"
            return Came.MORE
        if want == "comma" and char == ",":
            self._want = "key" if self._open[-1] == "{" else "value"
            return Came.MORE
        return Came.BAD

    def _begin(self, char: str) -> Came:
        self._want = "comma"
        if char in "{[":
            self._open.append(char)
            self._want = "key or }" if char == "{" else "value or ]"
            return Came.MORE if len(self._open) <= MOST_DEEP else Came.BAD
        if char == '"':
            self._inside = "string"
        elif char in _WORDS:
            self._inside, self._so_far = "word", char
        elif char == "-" or char in "0123456789":
            self._inside, self._so_far = "number", char
        else:
            return Came.BAD
        return Came.MORE

    def _close(self, char: str) -> Came:
        fits = self._open and self._open[-1] + char in ("{}", "[]")
        if not fits or self._want not in ("comma", "key or }" if char == "}" else "value or ]"):
            return Came.BAD
        self._open.pop()
        self._want = "comma"
        return Came.MORE if self._open else Came.LAST

    def _token(self, char: str) -> Came:
        if self._inside == "number":
            if char in "+-.eE0123456789":
                self._so_far += char
                return Came.MORE if _NUMBER_SO_FAR.fullmatch(self._so_far) else Came.BAD
            self._inside = ""
            return Came.PAST if _NUMBER.fullmatch(self._so_far) else Came.BAD
        if self._inside == "word":
            return self._word(char)
        return self._string(char)

    def _word(self, char: str) -> Came:
        self._so_far += char
        word = _WORDS[self._so_far[0]]
        if not word.startswith(self._so_far):
            return Came.BAD
        if word == self._so_far:
            return self._over()
        return Came.MORE

    def _string(self, char: str) -> Came:
        if self._inside == "hex":
            self._hex -= 1
            self._inside = "hex" if self._hex else "string"
            return Came.MORE if char in "0123456789abcdefABCDEF" else Came.BAD
        if self._inside == "escape":
            self._inside, self._hex = ("hex", 4) if char == "u" else ("string", 0)
            return Came.MORE if char in '"\\/bfnrtu' else Came.BAD
        if char == '"':
            return self._over()
        if char == "\\":
            self._inside = "escape"
        return Came.BAD if char < " " else Came.MORE

    def _over(self) -> Came:
        self._inside = ""
        return Came.MORE if self._open else Came.LAST
