"""Several answers to one prompt, the best of them, and prompts that are only read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from maxstack.serve.choices import seed_of
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, ROUNDING, full, prompts

MODEL = build(CONFIG)
WARM = SamplingParams(max_tokens=8, temperature=1.2, seed=4)


@pytest.fixture(scope="module")
def engine():
    with Engine(MODEL, byte_tokenizer(), limits=LIMITS, buckets=(1, 4)) as engine:
        engine.warm_up()
        yield engine


def choices(engine, prompt, params, n, **options):
    async def all_of_them():
        streams = engine.asynchronous.open_choices(prompt, params, n, **options)
        return [await stream.whole() for stream in streams]

    return engine._wait(all_of_them())


def test_choices_are_what_each_seed_gives_alone_and_read_their_prompt_once(engine):
    prompt, counters = prompts(21, seed=31)[0], engine.asynchronous.scheduler.counters
    before = counters.prompt_tokens
    given = choices(engine, prompt, WARM, 4, request_id="four")
    # The first reads 21 tokens, the others the last one, which is alone on its page.
    assert counters.prompt_tokens - before == 21 + 3
    assert [output.cached_tokens for output in given] == [0, 20, 20, 20]
    assert [output.id for output in given] == ["four", "four/1", "four/2", "four/3"]
    for i, output in enumerate(given):
        own = dataclasses.replace(WARM, seed=seed_of(WARM.seed, i))
        [alone] = engine.generate([prompt], own)
        assert alone.token_ids == output.token_ids
    assert len({tuple(output.token_ids) for output in given}) > 1
    assert seed_of(WARM.seed, 0) == WARM.seed


def test_the_prompt_is_read_once_also_when_its_log_probabilities_are_wanted(engine):
    prompt, counters = prompts(21, seed=32)[0], engine.asynchronous.scheduler.counters
    before = counters.prompt_tokens
    first, *others = choices(engine, prompt, dataclasses.replace(WARM, prompt_logprobs=0), 3)
    assert counters.prompt_tokens - before == 21 + 2
    assert len(first.prompt_logprobs) == 21
    assert all(other.prompt_logprobs is None for other in others)


def test_the_best_answers_are_the_likeliest_and_come_first(engine):
    prompt = prompts(9, seed=33)[0]
    given = choices(engine, prompt, dataclasses.replace(WARM, logprobs=0), 6)
    sums = [output.cumulative_logprob for output in given]
    for output in given:
        np.testing.assert_allclose(output.cumulative_logprob, sum(one.logprob for one in output.logprobs))
    best = engine.best_of(prompt, dataclasses.replace(WARM, prompt_logprobs=1), 2, 6)
    assert [output.cumulative_logprob for output in best] == pytest.approx(sorted(sums)[::-1][:2], abs=1e-4)
    assert best[0].logprobs is None
    assert len(best[0].prompt_logprobs) == 9
    for n, best_of, part in ((0, 2, "n is|best_of"), (3, 2, "less than n 3"), (1, 129, "1 to 128")):
        with pytest.raises(UserError, match=part):
            choices(engine, prompt, WARM, 0) if n == 0 else engine.best_of(prompt, WARM, n, best_of)


def test_an_end_token_counts_for_how_likely_an_answer_is(engine):
    prompt = prompts(9, seed=34)[0]
    [whole] = engine.generate([prompt], dataclasses.replace(WARM, logprobs=0))
    stop = next(t for i, t in enumerate(whole.token_ids) if i and t not in whole.token_ids[:i])
    at = whole.token_ids.index(stop)
    [ended] = engine.generate([prompt], dataclasses.replace(WARM, logprobs=0, stop_token_ids=(stop,)))
    assert ended.token_ids == whole.token_ids[:at]
    wanted = sum(one.logprob for one in whole.logprobs[: at + 1])
    assert ended.cumulative_logprob == pytest.approx(wanted, abs=1e-4)


def test_a_prompt_is_scored_without_a_token_generated_and_up_to_the_last_place(engine):
    for length in (13, LIMITS.max_length):
        prompt = prompts(length, seed=35)[0]
        output = engine.score(prompt, 2)
        logprobs = jax.nn.log_softmax(full(MODEL, jnp.asarray([prompt]))[0])
        assert (output.token_ids, output.finish_reason, output.prompt_logprobs[0]) == ([], "length", None)
        for i, told in enumerate(output.prompt_logprobs[1:]):
            np.testing.assert_allclose(told.logprob, logprobs[i][prompt[i + 1]], atol=ROUNDING)
            np.testing.assert_allclose(
                [p for _, p in told.top], np.sort(logprobs[i])[::-1][:2], atol=ROUNDING
            )
