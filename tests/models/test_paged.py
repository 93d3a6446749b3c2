"""Decoding from pages gives the logits of a full forward pass: every kind of layer, in chunks and one by one."""

from typing import Any

import jax
import numpy as np
import pytest

from maxstack.models.generation.weights import unstack
from maxstack.models.paged.forward import Chunk, advance, keep, read
from maxstack.models.paged.pools import init_pools, page_bytes
from maxstack.models.transformer import Transformer
from tests.models.tiny import CONFIGS, QUICK, build, tokens

# Of logits of size 1: float32, sums in another order.
ROUNDING = {"rtol": 3e-5, "atol": 3e-5}
PAGE, PAGES = 4, 16
LENGTH = 24
full = jax.jit(lambda model, ids: model(ids), compiler_options=QUICK)
# Pages of two sequences, in no order; entry -1 is none, and 5 belongs to nobody.
TABLE = np.asarray([[7, 0, 12, 3, 9, 15], [2, 11, 1, 14, 8, 6]], np.int32)


class Scanned:
    """Layers as a scan that writes the pools."""

    def __init__(self, model: Transformer, dtype: str = "float32"):
        self.model: Any = model
        self.pools = init_pools(model.config, PAGES, PAGE, dtype)
        self._run = jax.jit(self.run, compiler_options=QUICK)

    def __call__(self, chunk: Chunk) -> jax.Array:
        logits, self.pools = self._run(self.model, self.pools, chunk)
        return logits

    @staticmethod
    def run(model, pools, chunk):
        x, pools = advance(model, pools, chunk)
        return model.logits(model.final_norm(x)), pools


class WrittenOut(Scanned):
    """Layers written out, whose rows another program writes."""

    def __init__(self, model: Transformer, dtype: str = "float32"):
        super().__init__(model, dtype)
        self.model = unstack(model)

    @staticmethod
    def run(model, pools, chunk):
        x, rows = read(model.outer.config, model, pools, chunk, writes=False)
        return model.logits(model.outer.final_norm(x)), keep(pools, rows, chunk)


class InPlace(WrittenOut):
    """Layers written out that write the pools."""

    @staticmethod
    def run(model, pools, chunk):
        x, pools = read(model.outer.config, model, pools, chunk, writes=True)
        return model.logits(model.outer.final_norm(x)), pools


def read_in_pieces(run: Scanned, ids: jax.Array, dtype=np.float32) -> dict[tuple[int, int], np.ndarray]:
    """Logits by (row, position): two chunks of ragged counts, then three tokens one by one."""
    found, lengths = {}, np.zeros(2, np.int32)
    for size, counts in ((7, (7, 4)), (7, (5, 7)), (1, (1, 1)), (1, (1, 1)), (1, (0, 1))):
        part = np.full((2, size), 9, np.int32)  # what pads a chunk must not matter
        for row, count in enumerate(counts):
            part[row, :count] = ids[row, lengths[row] : lengths[row] + count]
        documents = np.full(2, LENGTH, np.int32)
        logits = run(Chunk(part, TABLE, lengths, np.asarray(counts, np.int32), documents))
        for row, count in enumerate(counts):
            for i in range(count):
                found[row, int(lengths[row]) + i] = np.asarray(logits[row, i])
        lengths = lengths + np.asarray(counts, np.int32)
    assert lengths.tolist() == [14, 14]
    return found


QUICKLY = [("window", WrittenOut), ("latent", Scanned)]
ALL = [(name, form) for name in CONFIGS for form in (Scanned, WrittenOut, InPlace)]


@pytest.mark.parametrize(
    ("name", "form"),
    [*QUICKLY, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL if each not in QUICKLY)],
)
def test_pieces_from_pages_equal_a_full_forward_pass(name, form):
    model, ids = build(CONFIGS[name]), tokens(2, LENGTH)
    wanted = full(model, ids)
    for (row, at), logits in read_in_pieces(form(model), ids).items():
        np.testing.assert_allclose(logits, wanted[row, at], **ROUNDING, err_msg=f"row {row}, position {at}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Shares of the largest logit: a page's numbers have 8, 7 and 3 bits of magnitude. Measured: see the assertion.
    [("int8", 0.05), ("bfloat16", 0.02), ("int4", 0.6)],
)
@pytest.mark.parametrize("name", ["window", "latent"])
def test_few_bits_drift_little_and_by_the_same_whatever_the_pieces(name, dtype, bound):
    model, ids = build(CONFIGS[name]), tokens(2, LENGTH)
    wanted = np.asarray(full(model, ids))
    found = read_in_pieces(WrittenOut(model, dtype), ids)
    drift = max(np.abs(logits - wanted[at]).max() for at, logits in found.items()) / np.abs(wanted).max()
    assert 1e-4 < drift < bound
    together = read_in_pieces(Scanned(model, dtype), ids)
    for at, logits in found.items():  # keys are read from the pool in one form, rounded like it in the other
        np.testing.assert_allclose(logits, together[at], **ROUNDING)


def test_a_page_takes_the_bytes_of_its_numbers():
    config = CONFIGS["grouped"]
    numbers = 2 * 2 * 2 * 8 * PAGE  # layers, keys and values, kv heads, components, tokens
    assert page_bytes(config, PAGE, "float32") == 4 * numbers
    assert page_bytes(config, PAGE, "int8") == numbers + 4 * numbers // 8
    assert page_bytes(config, PAGE, "int4") == numbers // 2 + 4 * numbers // 8


@pytest.mark.parametrize("form", [pytest.param(Scanned, marks=pytest.mark.slow), WrittenOut])
def test_nobody_s_page_and_what_is_not_read_stay_untouched(form):
    model, ids = build(CONFIGS["grouped"]), tokens(2, LENGTH)
    run = form(model)
    read_in_pieces(run, ids)
    for leaf in jax.tree.leaves(run.pools):
        by_repeat = np.asarray(leaf).reshape(2, PAGES, *leaf.shape[1:])
        unused = [page for page in range(PAGES) if page not in (*TABLE[0, :4], *TABLE[1, :4])]
        assert not by_repeat[:, unused].any()
        assert by_repeat[:, TABLE[:, :3]].any(axis=(1, 2, 3, 4, 5)).all() if leaf.ndim == 4 else True


@pytest.mark.usefixtures("optimized")
def test_the_program_that_writes_rows_copies_no_pool():
    model = build(CONFIGS["grouped"])
    pools = init_pools(model.config, 64, PAGE, "float32")
    chunk = Chunk(np.zeros((2, 1), np.int32), TABLE, *(np.ones(2, np.int32) for _ in range(3)))
    rows = jax.eval_shape(
        lambda m, p, c: read(m.outer.config, m, p, c, writes=False), unstack(model), pools, chunk
    )[1]
    text = jax.jit(keep, donate_argnums=0).lower(pools, rows, chunk).compile().as_text() or ""
    shape = "f32[" + ",".join(map(str, pools[0][0].k_pages.shape)) + "]"
    assert shape in text
    assert f"= {shape}{{3,2,1,0}} copy(" not in text
