"""Texts as vectors, against plain forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from maxstack.serve.embedding import Part, Pool
from maxstack.serve.errors import NotFinite
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, prompts

# Sums over chunks and pages instead of the whole text, in float32, of numbers around 1.
ROUNDING = 2e-5
hidden = jax.jit(lambda model, ids: model.hidden(ids)[0][0])


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, limits=LIMITS, buckets=(1, 4)) as engine:
        engine.warm_up()
        yield engine


@pytest.mark.parametrize("length", [1, 7, 29, LIMITS.max_length])
def test_an_embedding_is_that_of_a_plain_forward_pass(engine, model, length):
    prompt = prompts(length, seed=41)[0]
    wanted = np.asarray(hidden(model, jnp.asarray([prompt])), np.float64)
    for _ in range(2):  # the second time the cache has its pages
        mean, last = (engine.embed(prompt, pooling) for pooling in ("mean", "last"))
        np.testing.assert_allclose(mean.vector, wanted.mean(0), atol=ROUNDING)
        np.testing.assert_allclose(last.vector, wanted[-1], atol=ROUNDING)
        assert (mean.tokens, mean.vector.dtype) == (length, np.float32)
    assert engine.asynchronous.compilations == 0


def test_embeddings_in_company_that_is_preempted_are_the_same(model):
    # Few pages: texts are read in part, lose their pages, and are read again.
    limits = dataclasses.replace(LIMITS, pages=17)
    texts = prompts(30, 41, 17, 33, 26, 9, seed=42)
    with Engine(model, limits=limits, buckets=(1, 4)) as engine:

        async def together():
            import asyncio

            asked = engine.asynchronous
            generating = asked.generate(texts, SamplingParams(max_tokens=20, temperature=0.0), priority=1)
            wanted = [asked.embed(text, ("mean", "last")[i % 2]) for i, text in enumerate(texts)]
            return (await asyncio.gather(generating, *wanted))[1:]

        for i, (text, given) in enumerate(zip(texts, engine._wait(together()), strict=True)):
            of_text = np.asarray(hidden(model, jnp.asarray([text])), np.float64)
            np.testing.assert_allclose(given.vector, of_text[-1] if i % 2 else of_text.mean(0), atol=ROUNDING)


def test_what_is_no_pooling_is_refused(engine):
    with pytest.raises(UserError, match="'max': it may be mean or last"):
        engine.embed([1, 2], "max")


def test_numbers_that_are_none_fail_their_request_alone():
    model = build(CONFIG)
    table = model.embedding.table[...]
    model.embedding.table[...] = table.at[7].set(jnp.nan)
    with Engine(model, limits=LIMITS, buckets=(1, 4)) as engine:
        for asked in (engine.embed, engine.score):
            with pytest.raises(NotFinite):
                asked([1, 2, 7, 3, 4])
            asked([1, 2, 3])


def test_a_text_that_is_read_again_begins_again():
    def part(start: int, number: float) -> Part:
        return Part(start, np.full(2, number, np.float32), np.full(2, 10 * number, np.float32))

    mean, last = Pool("mean"), Pool("last")
    for start, number in ((0, 8.0), (4, 5.0), (0, 1.0), (4, 2.0), (8, 3.0)):
        mean.take(part(start, number))
        last.take(part(start, number))
    assert mean.vector(12).tolist() == [0.5, 0.5]
    assert last.vector(12).tolist() == [30.0, 30.0]
