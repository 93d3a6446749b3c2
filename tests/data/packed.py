"""Splits whose every token is a number of its own, so that a packed row says where each token came from."""

from pathlib import Path

import numpy as np

from maxstack.data.batch import Batch
from maxstack.data.packing import Piece, empty_batch, fill_row
from maxstack.data.store import Split, SplitWriter


def write_split(folder: Path, lengths: list[int], shard_tokens: int = 50) -> Split:
    """A split of documents of these lengths: token ids count from 1 through all documents."""
    writer = SplitWriter(folder, "train", "<u4", shard_tokens=shard_tokens, keep_text=False)
    at = 1
    for length in lengths:
        writer.add(np.arange(at, at + length), b"", (0, 0))
        at += length
    return Split(folder, "train", {"splits": {"train": writer.close()}, "dtype": "<u4", "inputs": ["made"]})


def batch_of(split: Split, seq_len: int, rows: list[list[Piece]]) -> Batch:
    batch = empty_batch(len(rows), seq_len)
    for number, pieces in enumerate(rows):
        fill_row(batch, number, split, pieces)
    return batch


def check_batch(batch: Batch, lengths: list[int]) -> None:
    """Every claim about a row, token by token, from the ids alone."""
    ends = set(np.cumsum(lengths).tolist())
    starts = {0, *ends}
    for tokens, labels, segments, positions, weights in zip(*batch, strict=True):
        for i, (token, segment) in enumerate(zip(tokens.tolist(), segments.tolist(), strict=True)):
            before = segments[i - 1] if i else 0
            if segment == 0:
                assert token == labels[i] == positions[i] == weights[i] == 0
                assert i == 0 or i + 1 == len(tokens) or segments[i + 1] == 0, "padding stands at the end"
                continue
            # A label is the next token of the same document, whether or not it is in this row.
            assert (labels[i], weights[i]) == ((0, 0) if token in ends else (token + 1, 1))
            same = i > 0 and token == tokens[i - 1] + 1 and token - 1 not in starts
            assert segment == (before if same else before + 1)
            assert positions[i] == (positions[i - 1] + 1 if same else 0)
