import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import UserError
from maxstack.data import packing
from maxstack.data.best_fit import BestFit, plan
from maxstack.data.packing import Concat

from .packed import batch_of, check_batch, write_split

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
BOTH = pytest.mark.parametrize("kind", [Concat, BestFit])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 16), st.integers(0, 5))
def test_concat_rows_use_each_token_once_an_epoch(lengths, seq_len, seed):
    if sum(lengths) < seq_len:
        return
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), lengths)
        packed = Concat(split, seq_len, seed=seed, name="x")
        for epoch in range(2):
            first = epoch * packed.rows_per_epoch
            batch = batch_of(split, seq_len, packed.rows(np.arange(first, first + packed.rows_per_epoch)))
            check_batch(batch, lengths)
            tokens = batch.tokens[batch.segment_ids > 0].tolist()
            assert len(tokens) == len(set(tokens)) == packed.rows_per_epoch * seq_len
            assert sum(lengths) - len(tokens) < seq_len


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 16), st.integers(0, 5))
def test_best_fit_rows_use_every_token_and_cut_only_long_documents(lengths, seq_len, seed):
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), lengths)
        packed = BestFit(split, seq_len, seed=seed, name="x")
        ends = np.cumsum(lengths)
        for epoch in range(2):
            first = epoch * packed.rows_per_epoch
            rows = packed.rows(np.arange(first, first + packed.rows_per_epoch))
            batch = batch_of(split, seq_len, rows)
            check_batch(batch, lengths)
            assert sorted(batch.tokens[batch.segment_ids > 0].tolist()) == list(range(1, sum(lengths) + 1))
            for piece in (piece for row in rows for piece in row):
                length = lengths[int(np.searchsorted(ends, piece.end))]
                assert piece.stop - piece.start == length or length > seq_len
        assert packed.fill == pytest.approx(sum(lengths) / (packed.rows_per_epoch * seq_len))


@BOTH
def test_any_row_is_the_same_alone_in_any_order_and_in_a_new_object(tmp_path, kind):
    split = write_split(tmp_path, [7, 30, 2, 19, 1, 1, 12, 44])
    packed = kind(split, 8, seed=3, name="x")
    numbers = np.arange(3 * packed.rows_per_epoch)
    all_rows = packed.rows(numbers)
    for number in [*reversed(numbers.tolist()), 0]:
        assert kind(split, 8, seed=3, name="x").rows(np.array([number])) == [all_rows[number]]
        assert packed.rows(np.array([number])) == [all_rows[number]]


@BOTH
def test_epochs_seeds_and_sources_have_orders_of_their_own(tmp_path, kind):
    split = write_split(tmp_path, [9] * 40)

    def order(seed: int, name: str, epoch: int) -> list:
        packed = kind(split, 16, seed=seed, name=name)
        return packed.rows(np.arange(packed.rows_per_epoch) + epoch * packed.rows_per_epoch)

    orders = [order(0, "x", 0), order(0, "x", 1), order(1, "x", 0), order(0, "y", 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_a_sparse_index_gives_the_same_rows(tmp_path, monkeypatch):
    """Above 2**20 documents only every so many-th start is kept."""
    split = write_split(tmp_path, [3, 1, 8, 2, 5, 30, 1, 1, 4, 9, 2, 2, 7])
    numbers = np.arange(40)
    dense = Concat(split, 6, seed=1, name="x").rows(numbers)
    for entries, chunk in [(5, 4), (2, 100), (1, 1)]:
        monkeypatch.setattr(packing, "_INDEX_ENTRIES", entries)
        monkeypatch.setattr(packing, "_CHUNK", chunk)
        assert Concat(split, 6, seed=1, name="x").rows(numbers) == dense


def test_documents_without_tokens_are_passed_over(tmp_path):
    split = write_split(tmp_path, [0, 5, 0, 0, 7, 0])
    for kind in (Concat, BestFit):
        packed = kind(split, 4, seed=0, name="x")
        rows = packed.rows(np.arange(packed.rows_per_epoch))
        check_batch(batch_of(split, 4, rows), [5, 7])
        assert all(piece.stop > piece.start for row in rows for piece in row)


def test_a_corpus_shorter_than_a_row_is_refused_with_the_numbers(tmp_path):
    split = write_split(tmp_path, [5, 2])
    with pytest.raises(
        UserError, match=r"'plays' has 7 train tokens in 2 documents, fewer than one row of seq_len 8"
    ):
        Concat(split, 8, seed=0, name="plays")
    assert BestFit(split, 8, seed=0, name="plays").rows_per_epoch == 1


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm: the room left in each row, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity - length)
        else:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 30))
def test_the_plan_is_best_fit_decreasing(lengths, capacity):
    rows = plan(np.array(lengths), capacity)
    used = np.bincount(rows, weights=lengths)
    assert sorted((capacity - used).astype(int).tolist()) == best_fit_decreasing(lengths, capacity)
    assert set(rows.tolist()) == set(range(rows.max() + 1))
