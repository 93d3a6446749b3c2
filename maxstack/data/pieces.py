"""A packed row taken apart for showing: which text belongs to which document, and which of it counts."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maxstack.data.batch import Batch
from maxstack.data.tokenizer import Tokenizer


class TextPiece(NamedTuple):
    """A run of tokens of one segment and one weight."""

    text: str
    """Decoded, special tokens shown; an empty string for padding."""
    segment: int
    """Number of the document within the row; 0 is padding."""
    weight: float
    """Of the labels of these tokens."""
    start: int
    """Index of the first token in the row."""
    stop: int
    """Index after the last token."""


def text_pieces(batch: Batch, row: int, tokenizer: Tokenizer) -> list[TextPiece]:
    """The pieces of a row, in order; a new one wherever segment or weight changes."""
    tokens, segments, weights = (
        np.asarray(part)[row] for part in (batch.tokens, batch.segment_ids, batch.weights)
    )
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(weights) != 0)) + 1
    borders = [0, *changes.tolist(), len(tokens)]
    return [
        TextPiece(
            tokenizer.decode(tokens[start:stop], skip_special=False) if segments[start] else "",
            int(segments[start]),
            float(weights[start]),
            start,
            stop,
        )
        for start, stop in pairwise(borders)
    ]
