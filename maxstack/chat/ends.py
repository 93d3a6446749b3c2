"""What ends an answer, as the template ends it: one more id, or a text where the vocabulary has no such token."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from maxstack.config import UserError

PROBE = "qwxz"
"""An answer that no template contains."""


class Ends(NamedTuple):
    """Where generation stops."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@runtime_checkable
class Vocabulary(Protocol):
    """The part of a Tokenizer that is needed here."""

    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """As Tokenizer.encode."""
        ...


def ends_of(render: Callable[..., Any], tokenizer: Vocabulary) -> Ends:
    """The tokenizer's own stop ids, and what the template puts after an answer.

    They differ for a model whose end token ends a document rather than a turn, and for a template of the user's.
    """
    after, last = following(render)
    first = tokenizer.encode(after, special=True)[:1]
    if first and first[0] in tokenizer.special_ids:
        return Ends(tuple(dict.fromkeys([*tokenizer.stop_ids, *first])), ())
    return Ends(tokenizer.stop_ids, (after,) if after and last else ())


def following(render: Callable[..., Any]) -> tuple[str, bool]:
    """What stands between an answer and the end of its line, without blanks, and whether that is the end of the text.

    A template whose mask cannot be told renders prompts only: there, more follows. "" where the answer is not in it.
    """
    question = {"role": "user", "content": "?"}
    talk = [question, {"role": "assistant", "content": PROBE}]
    for messages, last in ((talk, True), ([*talk, question], False)):
        try:
            text = render(messages, add_generation_prompt=not last).text
        except UserError:
            continue
        line = text.rpartition(PROBE)[2].strip().splitlines()
        return (line[0].strip() if line and PROBE in text else ""), last
    return "", False
