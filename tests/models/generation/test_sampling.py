"""Choosing a token: against transformers' processors, a plain numpy version, and the probabilities it draws by."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.generation.params import MOST_BIASES, RowSettings, SamplingParams, row_settings
from maxstack.models.generation.sampling import Chosen, Seen, biased, choose, draw, filtered, penalised

GOLDEN = Path(__file__).parents[2] / "goldens" / "sampling.npz"
V = 300
run = jax.jit(choose)


def settings(*rows: SamplingParams) -> RowSettings:
    return row_settings(rows, V)


def seen(
    rows: int, prompt: dict[int, list[int]] | None = None, output: dict[int, list[int]] | None = None
) -> Seen:
    had, counts = np.zeros((rows, V), bool), np.zeros((rows, V), np.int32)
    for row, ids in (prompt or {}).items():
        had[row, ids] = True
    for row, ids in (output or {}).items():
        np.add.at(counts[row], ids, 1)
    return Seen(jnp.asarray(had), jnp.asarray(counts))


def logits(rows: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(4 * np.random.default_rng(seed).standard_normal((rows, V)), jnp.float32)


def chosen(
    x: jax.Array, params: list[SamplingParams], positions: list[int], had: Seen | None = None
) -> Chosen:
    return run(x, settings(*params), had or seen(len(params)), jnp.asarray(positions, jnp.int32))


def test_filters_and_penalties_equal_transformers():
    golden = np.load(GOLDEN)
    rows = [
        SamplingParams(temperature=t, top_k=int(k), top_p=p, min_p=m, repetition_penalty=r)
        for t, k, p, m, r in golden["settings"]
    ]
    s = settings(*rows)
    had = seen(len(rows), prompt={i: ids[:8].tolist() for i, ids in enumerate(golden["ids"])},
               output={i: ids[8:].tolist() for i, ids in enumerate(golden["ids"])})  # fmt: skip
    given = filtered(penalised(jnp.asarray(golden["logits"]), s, had), s)
    assert (np.isneginf(given) == np.isneginf(golden["scores"])).all()
    np.testing.assert_allclose(given, golden["scores"], rtol=1e-6)  # one division and product in float32


def plain(x: np.ndarray, p: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """The probabilities of the next token, sorted and looped over in float64."""
    x = x.astype(np.float64).copy()
    for token, amount in p.logit_bias:
        x[token] += amount
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in output:
        x[token] -= p.frequency_penalty
    for token in set(output):
        x[token] -= p.presence_penalty
    x /= p.temperature
    order = np.argsort(-x)
    keep = order[: p.top_k or len(x)]
    share = np.exp(x[keep] - x[keep].max())
    share /= share.sum()
    keep = keep[: int(np.searchsorted(np.cumsum(share), p.top_p)) + 1]
    probabilities = np.zeros(len(x))
    probabilities[keep] = np.exp(x[keep] - x[keep].max())
    probabilities[probabilities < p.min_p] = 0
    return probabilities / probabilities.sum()


MIXED = [
    SamplingParams(
        temperature=0.9, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3, top_k=40
    ),
    SamplingParams(temperature=1.7, top_k=30, top_p=0.6, min_p=0.2),
    SamplingParams(temperature=1.1, logit_bias=((3, 9.0), (4, -100.0)), frequency_penalty=-0.5),
]


def test_settings_of_each_row_equal_a_plain_implementation():
    x, prompt, output = logits(3), [1, 2, 3, 4, 5, 50], [7, 7, 7, 8, 50]
    had = seen(3, dict.fromkeys(range(3), prompt), dict.fromkeys(range(3), output))
    s = settings(*MIXED)
    given = jax.nn.softmax(filtered(penalised(biased(x, s), s, had), s), -1)
    for row, params in enumerate(MIXED):
        np.testing.assert_allclose(given[row], plain(np.asarray(x[row]), params, prompt, output), atol=2e-6)


def test_draws_follow_the_probabilities():
    x, params, draws = logits(1)[0], SamplingParams(temperature=1.5, top_p=0.9), 20_000
    wanted = plain(np.asarray(x), params, [], [])
    kept = jnp.broadcast_to(filtered(x[None], settings(params)), (draws, V))
    tokens = draw(kept, jnp.zeros(draws, jnp.uint32), jnp.arange(draws))
    counts = np.bincount(tokens, minlength=V)
    assert not counts[wanted == 0].any()
    likely = wanted * draws > 20
    z = (counts - wanted * draws)[likely] / np.sqrt(wanted * draws * (1 - wanted))[likely]
    assert likely.sum() > 15
    assert np.abs(z).max() < 4.5
    assert (z**2).mean() < 2.0


def test_a_draw_at_the_very_end_is_a_token_that_can_be():
    # Zeros behind the last possible token, and before the first one.
    x = jnp.full((2, V), -jnp.inf).at[:, 270].set(0.0)
    assert draw(x, jnp.asarray([0, 1], jnp.uint32), jnp.asarray([3, 4])).tolist() == [270, 270]


def test_a_row_draws_the_same_whatever_its_place_and_its_batch_mates():
    x, params = logits(1), SamplingParams(temperature=1.0, seed=7, top_p=0.95)
    alone = [chosen(x, [params], [at]).tokens_b[0] for at in range(6)]
    for at in range(6):
        mates = [*MIXED, params]
        mixed = chosen(jnp.concatenate([logits(3, 5), x]), mates, [9, 1, at, at])
        assert mixed.tokens_b[3] == alone[at]
    assert len({int(token) for token in alone}) > 2
    other = [
        chosen(x, [SamplingParams(temperature=1.0, seed=8, top_p=0.95)], [at]).tokens_b[0] for at in range(6)
    ]
    assert other != alone


def test_zero_temperature_takes_the_likeliest_of_the_penalised_logits_beside_rows_that_draw():
    x = logits(2)
    best = int(jnp.argmax(x[0]))
    rows = [SamplingParams(temperature=0.0, presence_penalty=50.0), SamplingParams(temperature=1.0)]
    given = chosen(x, rows, [1, 1], seen(2, output={0: [best]}))
    assert given.tokens_b[0] == jnp.argsort(x[0])[-2]
    assert chosen(x, rows, [1, 1]).tokens_b[0] == best


def test_top_k_of_one_is_the_likeliest_at_any_temperature():
    assert (
        chosen(logits(1), [SamplingParams(temperature=9.0, top_k=1)], [1]).tokens_b[0]
        == logits(1)[0].argmax()
    )


def test_logprobs_are_the_models_own_whatever_the_settings():
    x = logits(2)
    rows = [SamplingParams(temperature=3.0, top_k=1, logprobs=4, logit_bias=((5, 20.0),)), SamplingParams()]
    given = chosen(x, rows, [1, 1])
    wanted = jax.nn.log_softmax(x)
    token = int(given.tokens_b[0])
    assert token == 5
    np.testing.assert_allclose(given.logprobs_b[0], wanted[0, token], rtol=1e-6)
    order = np.argsort(-np.asarray(x[0]))[:4]
    assert given.top_ids_bm[0, :4].tolist() == order.tolist()
    np.testing.assert_allclose(given.top_logprobs_bm[0, :4], wanted[0, order], rtol=1e-5)


def test_one_program_serves_all_settings(compilations):
    x = logits(3)
    chosen(x, [SamplingParams(temperature=0.0)] * 3, [1, 1, 1])
    before = len(compilations)
    for rows in (MIXED, MIXED[::-1], [SamplingParams(logprobs=5, seed=3)] * 3):
        chosen(x, rows, [4, 5, 6])
    assert len(compilations) == before


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"), ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"), ({"top_k": -1}, "top_k is -1"), ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"), ({"seed": 2**32}, "seed is 4294967296"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"), ({"stop": ""}, "stop is ''"),
        ({"stop": ("",)}, "at least one character"), ({"logprobs": 21}, "0 to 20"),
        ({"logit_bias": ((1, 1.0),) * (MOST_BIASES + 1)}, "at most 300"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(fields, part):
    with pytest.raises(UserError, match=part):
        SamplingParams(**fields)
