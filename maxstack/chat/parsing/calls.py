"""Text with calls in it, taken apart."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from maxstack.chat.parsing.bodies import NOTHING, Body
from maxstack.chat.parsing.json_value import BLANK
from maxstack.chat.parsing.pieces import CallArguments, CallStart, Piece, Text
from maxstack.chat.parsing.styles import Style


def new_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """Finds the calls in a text. What looks like one and is none stays text; blanks beside calls are left out."""

    def __init__(self, style: Style, schemas: Mapping[str, Any] | None, ids: Callable[[], str] = new_id):
        """`schemas` are those of the tools by name; a bare call must be of one of them, where they are given."""
        self._style, self._schemas, self._ids = style, schemas, ids
        self._at = "bare" if style.bare else "text"  # text, bare, inside, close
        self._held = ""
        """Text: what may begin a call, and blanks before it. Else: what is text if this is no call."""
        self._body: Body | None = None
        self._index = -1
        self._certain = self._marked = False
        self._called = False  # a call has come, and no text since

    def feed(self, text: str) -> list[Piece]:
        """What is certain with this text."""
        pieces: list[Piece] = []
        while text:
            if self._at == "text":
                text = self._text(text, pieces)
            else:
                text = getattr(self, f"_{self._at}")(text[0], pieces) + text[1:]
        return pieces

    def end(self) -> list[Piece]:
        """The rest."""
        pieces: list[Piece] = []
        if self._at == "inside" and self._certain and self._body is not None:
            self._argue(self._body.end(), pieces)
        elif self._at != "close" and (not self._called or self._held.strip(BLANK + self._style.between)):
            self._say(self._held, pieces)
        self._held = ""
        return pieces

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._called:
            text = text.lstrip(BLANK)
        if text:
            pieces.append(Text(text))
            self._called = False

    def _argue(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(CallArguments(self._index, text))

    def _text(self, text: str, pieces: list[Piece]) -> str:
        """Text up to where a call opens; what is left."""
        whole, self._held = self._held + text, ""
        places = [(at, mark) for mark in self._style.opens if (at := whole.find(mark)) >= 0]
        if not places:
            cut = len(whole) - max(overlap(whole, mark) for mark in self._style.opens)
            cut = len(whole[:cut].rstrip(BLANK))
            self._say(whole[:cut], pieces)
            self._held = whole[cut:]
            return ""
        at, mark = min(places)
        self._say(whole[:at].rstrip(BLANK), pieces)
        self._held = whole[len(whole[:at].rstrip(BLANK)) : at + len(mark)]
        self._open(marked=True)
        return whole[at + len(mark) :]

    def _open(self, *, marked: bool) -> None:
        self._at, self._body = "inside", self._style.body(self._schemas or {})
        self._certain, self._marked = False, marked

    def _bare(self, char: str, pieces: list[Piece]) -> str:
        """The beginning, or what follows a bare call: a body, or blanks, or text."""
        if char == "{":
            self._open(marked=False)
            return char
        if char in BLANK or (self._called and char in self._style.between):
            self._held += char
            return ""
        return self._back_to_text(char)

    def _back_to_text(self, char: str) -> str:
        text = self._held + char
        self._held, self._at, self._body = "", "text", None
        return text

    def _inside(self, char: str, pieces: list[Piece]) -> str:
        """A character of a body; what is left of it."""
        said = NOTHING if self._body is None else self._body.push(char)
        if said.bad:
            if not self._certain:
                self._say(self._held, pieces)
            self._held = ""
            return self._back_to_text(char)
        if not self._certain:
            self._held += char
        if said.name is not None:
            if self._strange(said.name):
                return self._back_to_text("")
            self._held, self._certain, self._called = "", True, True
            self._index += 1
            pieces.append(CallStart(self._index, self._ids(), said.name))
        self._argue(said.arguments, pieces)
        if said.done:
            self._body = None
            self._at = "close" if self._style.closes else "bare" if self._style.bare else "text"
        return ""

    def _strange(self, name: str) -> bool:
        """A bare object that happens to have a name and parameters, but of no tool."""
        return not self._marked and self._schemas is not None and name not in self._schemas

    def _close(self, char: str, pieces: list[Piece]) -> str:
        """After a call: its closing text, or none."""
        self._held += char
        found = self._held.lstrip(BLANK)
        if found == self._style.closes:
            self._held, self._at = "", "text"
            return ""
        if self._style.closes.startswith(found):
            return ""
        return self._back_to_text("")


def overlap(text: str, mark: str) -> int:
    """The longest end of the text that begins the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
