"""A conversation as the model reads it: special tokens and the mask of what is trained on."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from maxstack.chat.conversation import Rendering


@runtime_checkable
class Decoder(Protocol):
    """The part of a Tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """As Tokenizer.decode."""
        ...


class Run(NamedTuple):
    """Tokens next to each other that are alike."""

    text: str
    special: bool
    supervised: bool
    """Training would make the model say it."""


def runs(rendered: Rendering, tokenizer: Decoder) -> list[Run]:
    """The rendered ids as text, cut where special tokens or the mask begin and end.

    Decoded from the ids, so that what is shown is what the model gets.
    """
    special: dict[int, bool] = {}
    for token in set(rendered.ids):
        special[token] = not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special=False))
    marked = [
        (token, special[token], bool(on)) for token, on in zip(rendered.ids, rendered.mask, strict=True)
    ]
    return [
        Run(tokenizer.decode([token for token, _, _ in group], skip_special=False), *alike)
        for alike, group in itertools.groupby(marked, key=lambda each: each[1:])
    ]
