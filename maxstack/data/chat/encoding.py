"""A rendered text as ids: the template's special tokens become special tokens, the same texts inside messages do not.

The text is encoded as a whole, as transformers encodes it, so that no border of a message changes how its characters
merge. Only where a message holds the text of a special token is it cut, at that text.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from maxstack.data.chat.fence import Span

_GUARDS = ("\n", "\t", "0", "。")
"""One goes before a piece, and off again, where the tokenizer begins each text with a blank."""


@runtime_checkable
class Spanned(Protocol):
    """The part of a Tokenizer that is needed here."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """As Tokenizer.encode."""
        ...

    def encode_spans(self, text: str, *, special: bool = False) -> tuple[list[int], list[Span]]:
        """As Tokenizer.encode_spans."""
        ...


class Encoded(NamedTuple):
    """Ids, and the characters that each stands for."""

    ids: list[int]
    spans: list[Span]

    def mask(self, supervised: Sequence[Span]) -> list[bool]:
        """Whether each token begins in one of the spans, which are in order and apart.

        A token that grew over the border (line ends before and in an answer) begins in the prompt: a model that is
        given the prompt cannot say it.
        """
        mask, at = [], 0
        for begin, _ in self.spans:
            while at < len(supervised) and supervised[at][1] <= begin:
                at += 1
            mask.append(at < len(supervised) and supervised[at][0] <= begin)
        return mask


def encode(tokenizer: Spanned, text: str, plain: Sequence[Span] = ()) -> Encoded:
    """Ids of a rendered text; inside the spans `plain`, in order and apart, nothing becomes a special token."""
    done = Encoded([], [])
    at = 0
    for begin, end in [*plain, (len(text), len(text))]:
        _append(done, tokenizer, text[at:begin], at, special=True)
        _append(done, tokenizer, text[begin:end], begin, special=False)
        at = end
    return done


def _append(done: Encoded, tokenizer: Spanned, piece: str, offset: int, *, special: bool) -> None:
    if not piece:
        return
    for guard in _GUARDS if done.ids and _begins_with_blank(tokenizer) else ("",):
        skipped = len(tokenizer.encode(guard))
        ids, spans = tokenizer.encode_spans(guard + piece, special=special)
        if not skipped or spans[skipped - 1][1] == len(guard):  # it did not grow together with the piece
            break
    else:
        ids, spans = tokenizer.encode_spans(piece, special=special)
        skipped, guard = 0, ""
    shift = offset - len(guard)
    done.ids.extend(ids[skipped:])
    done.spans.extend((begin + shift, end + shift) for begin, end in spans[skipped:])


def _begins_with_blank(tokenizer: Spanned) -> bool:
    """Whether a tokenizer puts a blank before each text, as SentencePiece does."""
    alone, after = tokenizer.encode("a"), tokenizer.encode("\na")
    return alone != after[-len(alone) :]
