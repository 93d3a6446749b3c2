"""Thoughts that a model writes before its answer, told apart while the text comes."""

from typing import Literal, NamedTuple

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
"""How templates mark thoughts."""


class Piece(NamedTuple):
    """Text of one kind."""

    kind: Literal["answer", "reasoning"]
    text: str


def tags_of(template: str) -> tuple[str, str] | None:
    """The marks of thoughts in a chat template, or None where it has none."""
    return next(((first, last) for first, last in TAGS if last in template), None)


class Splitter:
    """Cuts an answer's text into thoughts and answer: `push` text as it comes, then `finish`.

    Thoughts stand at the beginning only, so that an answer which talks about tags stays whole. The tags and the blank
    space around them are left out.
    """

    def __init__(self, tags: tuple[str, str] | None, prompt: str = ""):
        """`prompt` is the rendered one: a template may have opened the thoughts itself."""
        self._first, self._last = tags or ("", "")
        opened = tags is not None and prompt.rstrip().endswith(self._first)
        self._at = "inside" if opened else "before" if tags is not None else "after"
        self.thought = opened
        """Whether there are thoughts."""
        self._held, self._begun = "", tags is None

    @property
    def place(self) -> str:
        """Where the text so far ends: "before" the thoughts, "inside" or "after" them."""
        return self._at

    @property
    def over(self) -> bool:
        """Whether whatever comes is answer, as it is."""
        return self._at == "after" and self._begun and not self._held

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        pieces: list[Piece] = []
        if self._at == "before":
            self._enter()
        if self._at == "inside":
            pieces += self._think()
        if self._at == "after":
            pieces += self._answer()
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, when the text has ended."""
        kind = "reasoning" if self._at == "inside" else "answer"
        text = self._held.rstrip() if kind == "reasoning" else self._held
        self._held = ""
        return [Piece(kind, text)] if text else []

    def _enter(self) -> None:
        found = self._held.lstrip()
        if found.startswith(self._first):
            self._at, self._held = "inside", found.removeprefix(self._first)
            self.thought = True
        elif not self._first.startswith(found):
            self._at, self._begun = "after", True

    def _think(self) -> list[Piece]:
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        thought, found, rest = self._held.partition(self._last)
        if found:
            self._at, self._held, self._begun = "after", rest, False
            thought = thought.rstrip()
            return [Piece("reasoning", thought)] if thought else []
        # Kept back: what may begin the closing tag, and the blanks before it.
        cut = len(thought) - _overlap(thought, self._last)
        cut = len(thought[:cut].rstrip())
        self._held = thought[cut:]
        return [Piece("reasoning", thought[:cut])] if cut else []

    def _answer(self) -> list[Piece]:
        if not self._begun:
            self._held = self._held.lstrip()
        text, self._held = self._held, ""
        self._begun = self._begun or bool(text)
        return [Piece("answer", text)] if text else []


def _overlap(text: str, tag: str) -> int:
    """The longest end of the text that begins the tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
