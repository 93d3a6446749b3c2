"""Special tokens' texts that messages bring along, followed through a template by marks around them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maxstack.data.chat.marks import unused
from maxstack.data.chat.template import texts_of

Span = tuple[int, int]


class Fence:
    """Finds the texts of special tokens in plain data, and again in what a template makes of it."""

    def __init__(self, specials: Sequence[str]):
        longest_first = sorted({text for text in specials if text}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def needed(self, values: Sequence[Any]) -> bool:
        """Whether plain data holds the text of a special token."""
        return any(map(self._special.search, texts_of(values)))

    def around(self, value: Any, rendered: str) -> Any:
        """The data with a mark on both sides of each such text; `rendered` is the rendering without."""
        first, last = unused(rendered, 2)
        if isinstance(value, str):
            return self._special.sub(lambda found: f"{first}{found[0]}{last}", value)
        if isinstance(value, Mapping):
            return {self.around(key, rendered): self.around(one, rendered) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.around(one, rendered) for one in value]
        return value

    def spans(self, fenced: str, rendered: str) -> list[Span] | None:
        """Where in the rendering the texts are that data brought along; `fenced` is it again, of the marked data.

        None where the marks changed what the template does, so that it cannot be told.
        """
        first, last = unused(rendered, 2)
        pieces: list[str] = []
        spans: list[Span] = []
        position = at = 0
        for found in re.finditer(f"{first}({self._special.pattern}){last}|{first}|{last}", fenced):
            pieces += [fenced[position : found.start()], found[1] or ""]
            at += len(pieces[-2])
            if found[1]:
                spans.append((at, at + len(found[1])))
            at, position = at + len(pieces[-1]), found.end()
        pieces.append(fenced[position:])
        return spans if "".join(pieces) == rendered else None
