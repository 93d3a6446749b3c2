"""Requests with adapters against models whose weights have the deltas in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from tests.models.lora import with_deltas, write_adapter
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, full, prompts

MODEL = build(CONFIG)
SLOTS = AdapterSlots(count=3, rank=4)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
# Deltas beside the weights and not in them: products in another order, in float32, of log-probabilities around 5.
ROUNDING = 3e-4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders, and the merged models, by name."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for i, (name, options) in enumerate({
        "all": {"rank": 4}, "low": {"rank": 1, "targets": ("q_proj", "v_proj")},
        "uneven": {"rank": 2, "ranks": {"self_attn.o_proj": 4}, "use_rslora": True},
    }.items()):  # fmt: skip
        where, deltas = write_adapter(folder / name, MODEL, seed=i, **options)
        made[name] = where, with_deltas(MODEL, deltas)
    return made


@pytest.fixture(scope="module", params=["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def engine(request, adapters):
    with Engine(MODEL, limits=LIMITS, buckets=(1, 4), adapters=SLOTS, on=request.param) as engine:
        engine.warm_up()
        for name, (folder, _) in adapters.items():
            engine.adapters.load(name, folder)
        yield engine


def check(model, output):
    """Each token is the likeliest of a full forward pass of the model, with that log-probability."""
    ids = [*output.prompt_token_ids, *output.token_ids]
    logprobs = jax.nn.log_softmax(full(model, jnp.asarray([ids + [0] * (64 - len(ids))]))[0])
    for i, (token, told) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        at = logprobs[len(output.prompt_token_ids) - 1 + i]
        assert float(at[token]) > float(at.max()) - ROUNDING
        np.testing.assert_allclose(told.logprob, at[token], atol=ROUNDING)


def ask(engine, asked):
    """Answers to (prompt, adapter) at once."""

    async def together():
        streams = [engine.asynchronous.open(p, GREEDY, adapter=name) for p, name in asked]
        return [await stream.whole() for stream in streams]

    return engine._wait(together())


def test_requests_with_different_adapters_and_none_in_one_batch_get_what_merged_models_give(engine, adapters):
    rows = prompts(5, 17, 9, 22, 12, 7, 3, seed=51)
    names = [None, "all", "low", "uneven", "all", None, "low"]
    for name, output in zip(names, ask(engine, list(zip(rows, names, strict=True))), strict=True):
        check(MODEL if name is None else adapters[name][1], output)
    plain = full(MODEL, jnp.asarray([rows[1]]))
    for _, merged in adapters.values():  # they differ by more than what is allowed for
        assert float(jnp.abs(full(merged, jnp.asarray([rows[1]])) - plain).max()) > 100 * ROUNDING
    assert engine.asynchronous.compilations == 0


def test_cached_pages_are_shared_by_requests_of_the_same_adapter_only(engine, adapters):
    [prompt] = prompts(24, seed=52)
    for name, cached in (("all", 0), ("all", 20), ("low", 0), (None, 0), ("low", 20)):
        [output] = ask(engine, [(prompt, name)])
        assert output.cached_tokens == cached
        check(MODEL if name is None else adapters[name][1], output)


def test_adapters_come_and_go_while_others_are_used_and_nothing_is_compiled(engine, adapters):
    [prompt], own = prompts(24, seed=53), engine.adapters
    longer = dataclasses.replace(GREEDY, max_tokens=30)

    async def run():
        asked = engine.asynchronous
        using, other = asked.open(prompt, longer, adapter="low"), asked.open(prompt, longer, adapter="all")
        own.unload("low")
        with pytest.raises(UserError, match="no adapter 'low': there are all, uneven"):
            asked.open(prompt, GREEDY, adapter="low")
        with pytest.raises(UserError, match=r"all 3 places .* low is still used"):
            own.load("new", adapters["low"][0])
        return await using.whole(), await other.whole()

    using, other = engine._wait(run())
    check(adapters["low"][1], using)
    check(adapters["all"][1], other)
    own.load("low", adapters["uneven"][0])  # the name again, and another adapter behind it
    [output] = ask(engine, [(prompt, "low")])
    assert output.cached_tokens == 0
    check(adapters["uneven"][1], output)
    own.unload("low")
    own.load("low", adapters["low"][0])
    assert own.names() == ["all", "uneven", "low"]
    assert engine.asynchronous.compilations == 0


def test_what_cannot_be_loaded_changes_nothing(engine, adapters, tmp_path):
    own = engine.adapters
    with pytest.raises(UserError, match="'all' is there already"):
        own.load("all", adapters["low"][0])
    own.unload("uneven")
    high, _ = write_adapter(tmp_path / "high", MODEL, rank=5)
    for folder, part in (
        (high, "has rank 5; this server has room for 4"),
        (tmp_path, "no adapter_config.json"),
    ):
        with pytest.raises(UserError, match=part):
            own.load("new", folder)
    own.load("uneven", adapters["uneven"][0])  # its place was not lost
    assert own.names() == ["all", "low", "uneven"]
    with pytest.raises(UserError, match="no adapter 'none'"):
        engine.generate([[1]], GREEDY, adapter="none")


def test_without_room_there_is_no_cost_and_no_adapter(adapters):
    from maxstack.serve.forms import form_for

    _, weights = form_for(MODEL)
    assert isinstance(weights, list)
    with Engine(MODEL, limits=LIMITS, buckets=(1, 4)) as plain, pytest.raises(UserError, match="no room"):
        plain.adapters.load("all", adapters["all"][0])
    with pytest.raises(UserError, match=r"no linear map 'attention.z' .* attention.k"):
        Engine(MODEL, limits=LIMITS, adapters=AdapterSlots(targets=("attention.z",)))


def test_targets_bound_what_adapters_may_change(adapters):
    slots = AdapterSlots(count=1, rank=4, targets=("attention.q", "attention.v"))
    with Engine(MODEL, limits=LIMITS, adapters=slots) as engine:
        with pytest.raises(
            UserError, match=r"adapter of model.layers.0.\S+ is not served here; .* attention.q"
        ):
            engine.adapters.load("all", adapters["all"][0])
        room = engine.asynchronous._loop.device.weights[1]
        assert {tuple(sorted(part)) for part in room} == {("attention.q", "attention.v")}
