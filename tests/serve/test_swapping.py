"""Other weights while the server answers."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine, swapping
from maxstack.serve.swapping import SwapFailed
from tests.models.lora import with_deltas, write_adapter
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, full, prompts

OLD, NEW = build(CONFIG), build(CONFIG, seed=1)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0)
LONG = dataclasses.replace(GREEDY, max_tokens=40)
# Sums over pages and chunks, in float32, of log-probabilities around 5.
ROUNDING = 3e-4
PROMPT = prompts(21, seed=61)[0]


@pytest.fixture(scope="module")
def engine():
    # One plan at a time: between two of them nothing is under way while requests are.
    limits = dataclasses.replace(LIMITS, ahead=1)
    with Engine(OLD, limits=limits, buckets=(1, 4)) as engine:
        engine.warm_up()
        yield engine


def is_of(model, output) -> bool:
    """Whether every token has the log-probability that the model gives it, and is its likeliest."""
    ids = [*output.prompt_token_ids, *output.token_ids]
    logprobs = jax.nn.log_softmax(full(model, jnp.asarray([ids + [0] * (64 - len(ids))]))[0])
    at = logprobs[len(output.prompt_token_ids) - 1 : len(ids) - 1]
    told = np.asarray([one.logprob for one in output.logprobs])
    return bool(np.allclose(told, np.asarray(at).max(-1), atol=ROUNDING)) and output.finish_reason == "length"


def test_what_has_begun_ends_on_the_old_weights_and_what_comes_later_is_of_the_new_ones(engine):
    async def run():
        asked = engine.asynchronous
        before = [asked.open(prompt, LONG) for prompt in (PROMPT, PROMPT[:9])]
        await before[0].next()
        await before[1].next()
        swapping = asyncio.create_task(asked.swap_weights(NEW))
        while not (asked.scheduler.holding or swapping.done()):
            await asyncio.sleep(0.001)
        after = [asked.open(PROMPT, GREEDY), asked.open(PROMPT[:9], GREEDY)]
        outputs = [await stream.whole() for stream in (*before, *after)]
        await swapping
        return outputs

    outputs = engine._wait(run())
    assert [is_of(OLD, output) for output in outputs] == [True, True, False, False]
    assert [is_of(NEW, output) for output in outputs] == [False, False, True, True]
    assert outputs[2].cached_tokens == 0  # the old weights' keys are no longer there
    [again] = engine.generate([PROMPT], GREEDY)
    assert again.cached_tokens
    assert is_of(NEW, again)
    engine.swap_weights(OLD)
    assert is_of(OLD, engine.generate([PROMPT], GREEDY)[0])
    assert engine.asynchronous.compilations == 0


def test_requests_that_are_not_over_in_time_keep_the_old_weights(engine):
    async def run():
        asked = engine.asynchronous
        before = asked.open(PROMPT, LONG)
        await before.next()
        with pytest.raises(SwapFailed, match="the old weights stay"):
            await asked.swap_weights(NEW, within_s=0.0)
        after = asked.open(PROMPT[:9], GREEDY)
        return await before.whole(), await after.whole()

    assert all(is_of(OLD, output) for output in engine._wait(run()))
    assert not engine.asynchronous.scheduler.holding


def test_weights_that_are_no_match_and_exchanges_that_fail_leave_the_old_ones(engine, monkeypatch):
    wider = build(dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 1))
    with pytest.raises(UserError, match="differs from the one that is served in vocab_size"):
        engine.swap_weights(wider)

    def no_room(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patched:
        patched.setattr(swapping, "form_for", no_room)
        with pytest.raises(RuntimeError, match="EXHAUSTED"):
            engine.swap_weights(NEW)
    with monkeypatch.context() as patched:
        patched.setattr(engine.asynchronous._loop.device, "put_weights", no_room)
        with pytest.raises(RuntimeError, match="EXHAUSTED"):
            engine.swap_weights(NEW)
    assert is_of(OLD, engine.generate([PROMPT], GREEDY)[0])


@pytest.mark.parametrize("on", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_adapters_stay_beside_the_new_weights(on, tmp_path):
    folder, deltas = write_adapter(tmp_path, OLD, rank=2)
    with Engine(OLD, limits=LIMITS, buckets=(1, 4), on=on, adapters=AdapterSlots(count=3, rank=4)) as engine:
        engine.adapters.load("own", folder)
        assert is_of(with_deltas(OLD, deltas), engine.generate([PROMPT], GREEDY, adapter="own")[0])
        engine.swap_weights(NEW)
        assert is_of(with_deltas(NEW, deltas), engine.generate([PROMPT], GREEDY, adapter="own")[0])
        assert is_of(NEW, engine.generate([PROMPT], GREEDY)[0])
        assert engine.asynchronous.compilations == 0
