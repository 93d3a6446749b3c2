from itertools import pairwise

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.data.held_out import HeldOut, held_out
from maxstack.data.loader import Loader

SETTINGS = {"seq_len": 48, "batch_rows": 4}


def counted(found: HeldOut) -> list[tuple[int, int]]:
    """Each counted token with its label, in order."""
    pairs = []
    for batch in found:
        for tokens, labels, weights in zip(batch.tokens, batch.labels, batch.weights, strict=True):
            pairs += [(int(t), int(label)) for t, label, w in zip(tokens, labels, weights, strict=True) if w]
    return pairs


def expected(prepared, name: str) -> list[tuple[int, int]]:
    split = prepared.sources[name].held_out
    documents = (split.document(d).tolist() for d in range(split.documents))
    return [pair for tokens in documents for pair in pairwise(tokens)]


@pytest.mark.parametrize("overlap", [0, 1, 17, 47])
def test_every_held_out_token_counts_once_in_order(prepared, overlap):
    for name, source in prepared.sources.items():
        found = HeldOut(source, overlap=overlap, **SETTINGS)
        assert counted(found) == expected(prepared, name)
        assert len(list(found)) == len(found)
        assert found.bytes == source.held_out.bytes == len(found.text())
        assert found.text() == source.held_out_text()


def test_overlap_gives_context_from_the_row_before(prepared):
    found = HeldOut(prepared.sources["plays"], overlap=16, **SETTINGS)
    rows = np.concatenate([batch.tokens for batch in found])
    full = (found.tokens - 16) // 32  # rows after these are cut off by the end of the text, or padding
    assert full > 10
    assert (rows[1:full, :16] == rows[: full - 1, -16:]).all()


def test_uniform_predictions_cost_what_they_should(prepared):
    """A model that knows nothing: bits per byte are tokens times log2 of the vocabulary over bytes."""
    found = held_out(prepared, **SETTINGS)["plays"]
    nll = np.log(prepared.tokenizer.vocab_size)
    total = sum(float(batch.weights.sum()) * nll for batch in found)
    predicted = found.tokens - found.documents  # the first token of a document is given
    assert total / np.log(2) / found.bytes == pytest.approx(
        predicted * np.log2(prepared.tokenizer.vocab_size) / found.bytes
    )


def test_processes_share_the_batches(prepared):
    whole = list(HeldOut(prepared.sources["poems"], **SETTINGS))
    parts = [list(HeldOut(prepared.sources["poems"], rows=slice(p, p + 2), **SETTINGS)) for p in (0, 2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for all_rows, some, others in zip(batch, first, second, strict=True):
            assert np.array_equal(all_rows, np.concatenate([some, others]))


def test_a_share_is_whole_documents_and_grows(prepared):
    source = prepared.sources["plays"]
    sizes = [HeldOut(source, max_bytes=n, **SETTINGS) for n in (1, 600, 1500, 10**9)]
    assert sizes[0].documents == 1
    assert sizes[-1].bytes == source.held_out.bytes
    assert [s.bytes for s in sizes] == sorted(s.bytes for s in sizes)
    assert sizes[2].bytes <= 1500
    for found in sizes:
        assert len(found.text()) == found.bytes
        labels = [label for _, label in counted(found)]
        text = prepared.tokenizer.decode(labels)
        assert text.encode() == found.text()


def test_a_loader_gives_its_own_rows(config, prepared):
    found = Loader(config, prepared, batch_rows=8).held_out_rows("plays", max_bytes=500)
    assert (found.seq_len, found.batch_rows) == (config.seq_len, 8)
    assert found.bytes <= 500 or found.documents == 1


def test_nothing_held_out_is_said(prepared, tmp_path, config):
    import dataclasses

    from maxstack.data.prepare import prepare

    source = dataclasses.replace(config.sources[0], held_out_fraction=0.0)
    none = prepare(dataclasses.replace(config, sources=(source,), cache=str(tmp_path)))
    assert held_out(none, **SETTINGS) == {}
    with pytest.raises(UserError, match="'plays' holds nothing out"):
        HeldOut(none.sources["plays"], **SETTINGS)
    with pytest.raises(UserError, match="overlap 48"):
        HeldOut(prepared.sources["plays"], overlap=48, **SETTINGS)
