"""The engine's tokens against full forward passes of the same model, in every company."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import BlockConfig, RopeConfig
from maxstack.models.generation import SamplingParams
from maxstack.models.packing import packed
from maxstack.serve.errors import NotFinite, StepFailed
from maxstack.serve.forms import form_for
from tests.models.tiny import CONFIGS, GATED, GROUPED, build, model_config
from tests.serve.driven import (
    CONFIG,
    GREEDY,
    ROUNDING,
    VOCAB,
    Driven,
    check_greedy,
    device_of,
    full,
    prompts,
    tokens_of,
)  # fmt: skip

WARM = SamplingParams(max_tokens=8, temperature=1.3, seed=5, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def device(model):
    return device_of(model)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_prompts_that_come_at_any_time_in_any_company_get_the_tokens_of_full_forward_passes(
    model, device, count
):
    # Few pages: rows are preempted. Every third prompt begins like one before; every fifth is cancelled on the way.
    run, rng = Driven(device, pages=14), np.random.default_rng(0)
    rows = prompts(*rng.integers(1, 24, count), seed=1)
    rows = [rows[i - 3][:12] + row if i % 3 == 0 and i else row for i, row in enumerate(rows)]
    asked, cancelled = [], []

    def between() -> bool:
        for _ in range(rng.integers(0, 3)):
            if len(asked) < len(rows):
                length = int(rng.integers(1, 20))
                asked.append(run.ask(rows[len(asked)], dataclasses.replace(GREEDY, max_tokens=length)))
        if len(cancelled) < len(asked) // 5:
            cancelled.append(asked[5 * len(cancelled)])
            run.cancel(cancelled[-1])
        return len(asked) < len(rows)

    run.run(between)
    ended = [answer for answer in asked if answer.output.finish_reason != "cancelled"]
    assert len(ended) >= count * 4 // 5
    for answer in ended:
        assert answer.output.finish_reason == "length"
        check_greedy(model, answer)
    counters = run.scheduler.counters
    assert counters.num_preemptions > 3
    assert any(answer.output.cached_tokens for answer in ended)
    assert run.all_pages_free


MIXED = [
    WARM, SamplingParams(max_tokens=9, temperature=0.9, top_k=7, seed=1, repetition_penalty=1.3),
    GREEDY,
    SamplingParams(
        max_tokens=7, temperature=2.0, min_p=0.02, seed=9, frequency_penalty=0.6, presence_penalty=0.2
    ),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, logit_bias=((3, 4.0), (5, -9.0))),
]  # fmt: skip


@pytest.mark.parametrize(
    "company",
    [
        {}, {"steps": (1,), "ahead": 1}, {"chunks": ((1, 4),), "tokens_a_step": 8},
        {"pages": 9, "prefix_cache": False}, {"pages": 9},
    ],
    ids=["batch", "one at a time", "small chunks", "preempted", "preempted, with prefixes"],
)  # fmt: skip
def test_a_request_draws_the_same_tokens_alone_and_in_any_company(device, company):
    rows = prompts(5, 12, 20, 9, 12, seed=2)
    rows[4] = rows[1]
    alone = [
        Driven(device, prefix_cache=False).together([row], [own])[0]
        for row, own in zip(rows, MIXED, strict=True)
    ]
    run = Driven(device, **company)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        together = run.together([rows[i] for i in order], [MIXED[i] for i in order])
        assert tokens_of(together) == [alone[i].output.token_ids for i in order]
    assert (run.scheduler.counters.num_preemptions > 0) == ("pages" in company)
    assert len({tuple(answer.output.token_ids) for answer in alone}) == 5


def test_drawn_tokens_have_the_distribution_of_full_forward_passes(model, device):
    # One prompt with many seeds, one draw each: counts against probabilities.
    [prompt], draws = prompts(6, seed=3), 400
    run = Driven(device, waiting=draws)
    params = [SamplingParams(max_tokens=1, temperature=0.6, seed=seed) for seed in range(draws)]
    given = [tokens[0] for tokens in tokens_of(run.together([prompt] * draws, params))]
    wanted = np.asarray(jax.nn.softmax(full(model, jnp.asarray([prompt + [0] * 58]))[0, 5] / 0.6)) * draws
    counts = np.bincount(given, minlength=VOCAB)
    likely = wanted > 5
    found, hoped = (np.append(x[likely], x[~likely].sum()) for x in (counts, wanted))
    chi2, freedom = float(((found - hoped) ** 2 / hoped).sum()), len(hoped) - 1
    # Wilson and Hilferty's cube root of chi² is normal: four standard deviations.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert freedom > 5
    assert abs(z) < 4


def test_an_end_comes_no_earlier_than_allowed(device):
    [row] = prompts(9, seed=11)
    [[*whole]] = tokens_of(Driven(device).together([row]))
    run = Driven(device, end_ids=[whole[1]])
    [early] = run.together([row])
    [late] = run.together([row], [dataclasses.replace(GREEDY, min_tokens=4)])
    assert early.output.token_ids == whole[:1]
    assert late.output.token_ids[:1] == whole[:1]
    assert whole[1] not in late.output.token_ids
    assert len(late.output.token_ids) >= 4


def test_ends_and_lengths_are_noticed_on_the_device(device):
    rows = prompts(5, 12, 3, seed=4)
    whole = tokens_of(Driven(device).together(rows))
    third = whole[0][2]
    params = [
        dataclasses.replace(GREEDY, stop_token_ids=(third,)),
        dataclasses.replace(GREEDY, max_tokens=2),
        GREEDY,
    ]
    run = Driven(device)
    given = run.together(rows, params)
    assert tokens_of(given) == [whole[0][: whole[0].index(third)], whole[1][:2], whole[2]]
    assert [answer.output.finish_reason for answer in given] == ["stop", "length", "length"]
    ended = Driven(device, end_ids=[third])
    [by_default] = ended.together(rows[:1])
    assert by_default.output.finish_reason == "stop"
    [ignoring] = ended.together(rows[:1], [dataclasses.replace(GREEDY, ignore_eos=True)])
    assert ignoring.output.token_ids == whole[0]
    # More than the device looks for: the host sees to the rest.
    many = tuple(token for token in range(VOCAB) if token not in whole[1][:3])
    [late] = Driven(device).together([rows[1]], [dataclasses.replace(GREEDY, stop_token_ids=many)])
    assert late.output.token_ids == whole[1][: len(late.output.token_ids)]
    assert late.output.finish_reason == "stop"


def test_log_probabilities_of_a_prompt_are_those_of_a_full_forward_pass(model, device):
    rows = prompts(21, 1, 9, seed=5)
    run = Driven(device)
    run.together(rows)  # so that the prefix cache has them
    asking = dataclasses.replace(GREEDY, prompt_logprobs=3, max_tokens=2)
    for row, answer in zip(rows, run.together(rows, [asking, GREEDY, asking]), strict=True):
        told = answer.output.prompt_logprobs
        check_greedy(model, answer)
        if row is rows[1]:
            assert told is None
            continue
        wanted = jax.nn.log_softmax(full(model, jnp.asarray([row + [0] * (64 - len(row))]))[0])
        assert len(told) == len(row)
        assert told[0] is None
        for i, (token, found) in enumerate(zip(row[1:], told[1:], strict=True)):
            assert found.token_id == token
            np.testing.assert_allclose(found.logprob, wanted[i, token], atol=ROUNDING)
            np.testing.assert_allclose([p for _, p in found.top], np.sort(wanted[i])[::-1][:3], atol=ROUNDING)


def test_logits_that_are_no_numbers_fail_their_row_alone(device, monkeypatch):
    # In the table that tokens are looked up in, not in the output projection, which would poison every row.
    poisoned, broken = 7, build(CONFIG)
    broken.embedding.table[...] = broken.embedding.table[...].at[poisoned].set(jnp.nan)
    monkeypatch.setattr(device, "weights", form_for(broken)[1])  # weights are arguments: nothing is compiled
    rows = [[token if token != poisoned else 1 for token in row] for row in prompts(9, 12, 5, seed=6)]
    forbidden = dataclasses.replace(GREEDY, logit_bias=((poisoned, -1e9),))
    run = Driven(device)
    wanted = tokens_of(run.together(rows, forbidden))
    bad = run.ask([*rows[0][:8], poisoned, 3], forbidden)
    given = run.together(rows, forbidden)
    assert isinstance(bad.error, NotFinite)
    assert bad.output.finish_reason == "error"
    assert tokens_of(given) == wanted
    # Pages that held what is no number are used again, and hurt nobody.
    again = Driven(device, prefix_cache=False).together(rows * 3, forbidden)
    assert tokens_of(again) == wanted * 3
    assert run.all_pages_free


def test_a_failing_step_fails_nobody_once_and_its_requests_when_it_repeats(device, monkeypatch, caplog):
    rows = prompts(9, 12, 5, seed=7)
    wanted = tokens_of(Driven(device).together(rows))
    launch, calls = device.launch, []

    def failing_at(*numbers):
        def failing(plan):
            calls.append(plan)
            if len(calls) in numbers:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return launch(plan)

        calls.clear()
        monkeypatch.setattr(device, "launch", failing)

    failing_at(4)
    run = Driven(device)
    assert tokens_of(run.together(rows)) == wanted
    failing_at(*range(4, 100))
    answers = run.together(rows)
    assert all(isinstance(answer.error, StepFailed) for answer in answers if len(answer.output.token_ids) < 6)
    assert "RESOURCE_EXHAUSTED" in str(next(a.error for a in answers if a.error is not None))
    monkeypatch.undo()
    assert tokens_of(run.together(rows)) == wanted
    assert run.all_pages_free
    assert "a step has failed" in caplog.text


def test_nothing_is_compiled_after_warm_up(device, compilations):
    before = len(compilations)
    run = Driven(device, pages=12)
    run.together(
        prompts(1, 5, 30, 17, 9, 3, seed=8), [*MIXED, dataclasses.replace(GREEDY, prompt_logprobs=0)]
    )
    device.reset()
    assert len(compilations) == before


def test_no_compiled_step_copies_a_pool_or_a_weight(device):
    pools = {shape_of(leaf) for leaf in jax.tree.leaves(device._pools)}
    weights = {shape_of(leaf) for leaf in device.weights if leaf.size >= 512}
    keys = [key for key in device._programs if key[0] in ("decode", "chunk")]
    assert len(keys) >= 4
    for key in keys:
        text = device._programs[key].as_text()
        assert any(shape in text for shape in pools)
        assert not (pools | weights) & set(re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text)), key


def shape_of(leaf: jax.Array) -> str:
    return f"f32[{','.join(map(str, leaf.shape))}]"


FORMS = [(name, on) for name in ("window", "latent", "mixture", "clamped mixture") for on in ("cpu", "tpu")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "on"), FORMS)
def test_every_kind_of_layer_on_every_form(name, on):
    model = build(CONFIGS[name])
    run = Driven(device_of(model, on=on, buckets=(4,)), pages=12)
    for answer in run.together(prompts(1, 20, 9, 5, 14, 26, seed=9)):
        check_greedy(model, answer)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cpu", "tpu"])
def test_packed_weights_are_served(on):
    few = packed(build(CONFIG), "int8")
    run = Driven(device_of(few, on=on, buckets=(4,)), pages=12)
    for answer in run.together(prompts(1, 20, 9, 5, 14, 22, seed=12)):
        check_greedy(
            few, answer, 2e-3
        )  # products of few rows in C++ sum in another order than those of many in XLA


@pytest.mark.slow
def test_rotation_by_length_goes_by_the_whole_prompt_and_is_the_same_when_read_again():
    rope = RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=4)
    config = model_config(BlockConfig(attention=dataclasses.replace(GROUPED, rope=rope), feed_forward=GATED))
    model = build(config)
    device, rows = device_of(model), prompts(20, 9, 15, 17, seed=10)
    alone = [Driven(device, prefix_cache=False).together([row])[0] for row in rows]
    for row, answer in zip(rows, alone, strict=True):
        wanted = jax.nn.log_softmax(model(jnp.asarray([row]))[0, -1])
        np.testing.assert_allclose(answer.output.logprobs[0].logprob, wanted.max(), atol=ROUNDING)
    run = Driven(device, pages=9, prefix_cache=False)
    assert tokens_of(run.together(rows)) == tokens_of(alone)
    assert run.scheduler.counters.num_preemptions > 0
