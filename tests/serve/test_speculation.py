"""Steps that check guesses: the tokens are those of steps without, for any sampling and in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from maxstack.serve.drafter import Drafter
from maxstack.serve.drafts import LONGEST, SHORTEST, guessed
from maxstack.serve.forms import form_for
from maxstack.serve.pace import AGAIN, Pace
from maxstack.serve.programs import ENDED, NOT_FINITE, NOTHING, TOKEN, Told
from maxstack.serve.speculation import kept
from tests.models.tiny import build
from tests.serve.driven import CONFIG, GREEDY, LIMITS, VOCAB, Driven, check_greedy, device_of, full, tokens_of

DRAFTS = 3
SPECULATING = dataclasses.replace(LIMITS, drafts=DRAFTS, tokens_a_step=36)
# Few tokens, so that what was said comes again.
FEW = tuple((token, -100.0) for token in range(VOCAB) if token >= 4)
LONG = SamplingParams(max_tokens=36, temperature=0.0, logit_bias=FEW, logprobs=2)
MIXED = [
    LONG,
    dataclasses.replace(LONG, temperature=0.7, seed=3),
    dataclasses.replace(LONG, temperature=1.0, top_k=3, seed=4, logprobs=None),
    dataclasses.replace(LONG, temperature=0.8, seed=5, repetition_penalty=1.2, frequency_penalty=0.1),
    dataclasses.replace(LONG, max_tokens=17, min_tokens=9, stop_token_ids=(2,), temperature=0.9, seed=6),
    dataclasses.replace(GREEDY, max_tokens=30),
]


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def plain(model):
    return device_of(model)


@pytest.fixture(scope="module")
def device(model):
    return device_of(model, SPECULATING)


def rows_of(seed: int) -> list[list[int]]:
    """Prompts whose tokens come again."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 4, length).tolist() for length in (5, 12, 20, 9, 14, 3)]


@pytest.mark.parametrize(
    "company",
    [{}, {"steps": (1,), "ahead": 1}, {"chunks": ((1, 4),)}, {"pages": 20}, {"pages": 20, "prefix_cache": False}],
    ids=["batch", "one at a time", "small chunks", "preempted, with prefixes", "preempted"],
)  # fmt: skip
def test_tokens_are_those_without_guesses(plain, device, company):
    rows = rows_of(71)
    wanted = [
        Driven(plain, prefix_cache=False).together([row], own)[0]
        for row, own in zip(rows, [[m] for m in MIXED], strict=True)
    ]
    run = Driven(device, **company)
    for _ in range(2):
        given = run.together(rows, MIXED)
        assert tokens_of(given) == tokens_of(wanted)
        for one, other in zip(given, wanted, strict=True):
            assert one.output.finish_reason == other.output.finish_reason
            for a, b in zip(one.output.logprobs or (), other.output.logprobs or (), strict=True):
                np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)
    counters = run.scheduler.counters
    assert counters.spec_decode_num_accepted_tokens > 50  # otherwise nothing was tried
    assert run.all_pages_free
    if "pages" in company:
        assert counters.num_preemptions


def test_guesses_that_come_and_go_from_plan_to_plan_change_nothing(model, device, plain):
    rows = rows_of(72)
    run = Driven(device)
    run.scheduler.drafting = lambda rows: DRAFTS * (run.turns % 2)
    given = run.together(rows, MIXED)
    assert tokens_of(given) == tokens_of(Driven(plain).together(rows, MIXED))
    check_greedy(model, given[5])
    alone = Driven(device)
    alone.scheduler.drafting = lambda rows: DRAFTS * (alone.turns % 2)
    [answer] = alone.together(rows[:1], [LONG])
    # What is guessed from has every token, those of steps without guesses too.
    said = [*rows[0], *answer.output.token_ids]
    assert np.asarray(device._state.drafting.history_rl)[0, : len(said)].tolist() == said


def test_drawn_tokens_behind_kept_guesses_have_the_models_distribution(model, device):
    # Every pair of tokens is in the prompt, so there are guesses; the third token's counts, by the two before it.
    prompt, draws = np.random.default_rng(7).integers(0, 4, 40).tolist(), 300
    params = [
        SamplingParams(max_tokens=3, temperature=0.8, seed=seed, logit_bias=FEW) for seed in range(draws)
    ]
    run = Driven(device, waiting=draws)
    given = np.asarray(tokens_of(run.together([prompt] * draws, params)))
    assert run.scheduler.counters.spec_decode_num_accepted_tokens > draws // 10
    chi2, freedom = 0.0, 0
    for pair in np.unique(given[:, :2], axis=0):
        third = given[(given[:, :2] == pair).all(1), 2]
        ids = jnp.asarray([[*prompt, *pair.tolist()] + [0] * (64 - len(prompt) - 2)])
        wanted = np.asarray(jax.nn.softmax(full(model, ids)[0, len(prompt) + 1, :4] / 0.8)) * len(third)
        counts, likely = np.bincount(third, minlength=4), wanted > 5
        if likely.sum() > 1:
            chi2 += float(((counts - wanted)[likely] ** 2 / wanted[likely]).sum())
            freedom += int(likely.sum()) - 1
    # Wilson and Hilferty's cube root of chi² is normal: four standard deviations.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert freedom > 5
    assert z < 4


def test_numbers_that_are_none_behind_a_guess_fail_their_row_alone(model, device, monkeypatch):
    broken = build(CONFIG)
    table = broken.embedding.table[...]
    broken.embedding.table[...] = table.at[7].set(jnp.nan)
    monkeypatch.setattr(device, "weights", form_for(broken)[1])
    ending = dataclasses.replace(LONG, max_tokens=8, logit_bias=((7, 1000.0),))
    bad, good = Driven(device).together([[0, 1, 2] * 3, [0, 1, 2] * 3], [ending, LONG])
    assert (bad.output.finish_reason, good.output.finish_reason) == ("error", "length")


def test_nothing_is_kept_behind_a_wrong_guess_an_end_or_what_is_no_number():
    read = jnp.asarray([[5, 6, 7, 8]] * 4)
    tokens = jnp.asarray([[6, 7, 8, 9], [6, 0, 8, 9], [6, 7, 8, 9], [6, 7, 8, 9]])
    status = jnp.asarray([[TOKEN] * 4, [TOKEN] * 4, [TOKEN, ENDED, TOKEN, TOKEN], [NOT_FINITE, *[TOKEN] * 3]])
    none = jnp.zeros((16, 1))
    said = Told(tokens.reshape(-1), status.reshape(-1), none[:, 0], none.astype(int), none)
    assert kept(said, read).tolist() == [
        [TOKEN] * 4, [TOKEN, TOKEN, NOTHING, NOTHING], [TOKEN, ENDED, NOTHING, NOTHING],
        [NOT_FINITE, NOTHING, NOTHING, NOTHING],
    ]  # fmt: skip


def test_the_longest_then_latest_occurrence_is_guessed_and_goes_round():
    rng = np.random.default_rng(5)
    histories = rng.integers(0, 3, (200, 24))
    lengths = rng.integers(0, 23, 200)
    given, found = guessed(jnp.asarray(histories, jnp.int32), jnp.asarray(lengths, jnp.int32), DRAFTS)
    for history, n, guess, is_one in zip(histories.tolist(), lengths.tolist(), given, found, strict=True):
        best, at = 0, None
        for j in range(n):
            run = 0
            while run < LONGEST and run <= j and history[j - run] == history[n - run]:
                run += 1
            if run >= max(best, 1):
                best, at = run, j
        assert bool(is_one) == (best >= SHORTEST)
        if is_one:
            circle = history[at + 1 : n + 1]
            assert guess.tolist() == [circle[i % len(circle)] for i in range(DRAFTS)]


def test_guesses_are_made_while_they_pay_and_tried_again_now_and_then():
    pace = Pace(4, {1: 1.3, 4: 3.0})
    assert pace.drafts_for(1) == 4
    assert pace.drafts_for(5) == 0  # nothing is compiled for so many
    for _ in range(300):
        pace.learn(10, 11)  # one guess of ten row-steps
    assert sum(pace.drafts_for(1) > 0 for _ in range(10 * AGAIN)) == 10
    for _ in range(300):
        pace.learn(10, 25)
    assert pace.drafts_for(1) == 4
    assert sum(pace.drafts_for(3) > 0 for _ in range(10 * AGAIN)) == 10


def test_an_engine_with_guesses_measures_them_and_compiles_nothing_later(model):
    with Engine(model, limits=SPECULATING, buckets=(1, 4)) as engine:
        engine.warm_up()
        pace = engine.asynchronous._loop.pace
        assert set(pace.costs) == {1, 4}
        assert all(cost > 0 for cost in pace.costs.values())
        pace.costs = dict.fromkeys(pace.costs, 1.0)
        [output] = engine.generate([[0, 1, 2, 3] * 4], LONG)
        assert len(output.token_ids) == 36
        assert engine.asynchronous.compilations == 0
        assert engine.asynchronous.scheduler.counters.spec_decode_num_accepted_tokens > 0


@pytest.mark.slow
def test_a_draft_model_changes_no_token(model, plain):
    rows, kept = rows_of(74), []
    for seed in (0, 1):  # the model itself, and another one
        drafter = Drafter(build(CONFIG, seed=seed), CONFIG, SPECULATING, "float32")
        device = device_of(model, SPECULATING, drafter=drafter)
        run = Driven(device)
        for _ in range(
            2
        ):  # the second time with cached prefixes, whose pages have the small model's keys too
            assert tokens_of(run.together(rows, MIXED)) == tokens_of(Driven(plain).together(rows, MIXED))
        assert run.all_pages_free
        alike = Driven(device)
        alike.together(rows, MIXED[:3] * 2)
        counters = alike.scheduler.counters
        kept.append(counters.spec_decode_num_accepted_tokens / counters.spec_decode_num_draft_tokens)
    assert kept[0] > 0.85  # the model guesses itself, but for the ends of rows
    assert kept[1] < 0.7


def test_a_draft_model_that_cannot_guess_for_the_model_is_refused(model):
    other = build(dataclasses.replace(CONFIG, vocab_size=VOCAB - 1))
    with pytest.raises(UserError, match="knows 256 tokens, the model 257"):
        Engine(model, limits=SPECULATING, draft=other)
    with pytest.raises(UserError, match=r"Limits.drafts is 0"):
        Engine(model, limits=LIMITS, draft=model)


@pytest.mark.slow
def test_the_scan_gives_the_tokens_without_guesses_too(model):
    rows = rows_of(73)
    wanted = Driven(device_of(model, on="tpu")).together(rows, MIXED)
    for drafter in (None, Drafter(model, CONFIG, SPECULATING, "float32", "tpu")):
        given = Driven(device_of(model, SPECULATING, on="tpu", drafter=drafter)).together(rows, MIXED)
        assert tokens_of(given) == tokens_of(wanted)
