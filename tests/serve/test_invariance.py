"""On a CPU a request's tokens and log-probabilities are the same to the last bit, whatever happens around it."""

import dataclasses
import functools
from typing import Any, cast

import pytest

from maxstack.kernels import cpu_native
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation import SamplingParams
from maxstack.models.packing import packed
from maxstack.serve import Engine, invariant
from tests.models.tiny import CONFIGS, build
from tests.serve.driven import CONFIG, LIMITS, device_of, prompts
from tests.serve.test_invariant_mode import LIMITS as MODE
from tests.serve.test_invariant_mode import check

pytestmark = [
    pytest.mark.usefixtures("optimized"),  # what the compiler does to sums is the point
    pytest.mark.skipif(not cpu_native.available(), reason=f"no C++: {cpu_native.problem()}"),
]
PROMPTS = prompts(3, 17, 9, 30, 12, 5)
DRAWN = SamplingParams(max_tokens=14, temperature=1.0, top_k=40, top_p=0.95, seed=7, logprobs=2)
READ = dataclasses.replace(DRAWN, temperature=0.0, prompt_logprobs=2)
PARAMS = [
    DRAWN,
    READ,
    dataclasses.replace(READ, seed=8),
    DRAWN,
    dataclasses.replace(DRAWN, temperature=0.0),
    READ,
]


@functools.cache
def model():
    return build(CONFIG)


def test_invariant_mode_is_for_what_xla_computes(monkeypatch):
    def problem(model, **options) -> str:
        return invariant.problem(model, **options) or ""

    assert invariant.problem(model()) is None
    assert invariant.problem(packed(model(), "int4-g32")) is None
    assert not invariant.needed(model())
    for name, part in (("window", "LayerNorm"), ("mixture", "MoE"), ("latent", "LatentAttention")):
        assert part in problem(build(CONFIGS[name]))
    assert "adapters" in problem(model(), adapters=AdapterSlots(count=1, rank=2))
    assert "XLA" in problem(model(), on="tpu")
    monkeypatch.setattr(cpu_native, "problem", lambda: "switched off")
    assert "no C++: switched off" in problem(model())


@functools.cache
def alone():
    with Engine(model(), limits=LIMITS, buckets=(1, 4)) as engine:
        return one_by_one(engine)


def one_by_one(engine: Engine) -> list[tuple]:
    return [answer(engine.generate([p], own)) for p, own in zip(PROMPTS, PARAMS, strict=True)]


def answer(outputs: list) -> tuple:
    [output] = outputs
    return output.token_ids, output.logprobs, output.prompt_logprobs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunks": ((3, 16),), "tokens_a_step": 52},
        {"chunks": ((2, 6, 6), (4, 16, 16))},
        {"prefix_cache": False, "pages": 22},  # too few pages for all: some are preempted
        {"drafts": 2, "tokens_a_step": 28},
    ],
    ids=["together", "other chunks", "side by side", "preempted", "speculated"],
)
def test_company_chunks_preemption_and_speculation_change_no_bit(changes):
    limits = dataclasses.replace(LIMITS, **changes)
    with Engine(model(), limits=limits, buckets=(2, 4)) as engine:
        together = engine.generate(PROMPTS, PARAMS)
        if "pages" in changes:
            assert engine.asynchronous.scheduler.counters.num_preemptions > 0
        again = engine.generate(PROMPTS[::-1], PARAMS[::-1])[::-1]  # prefixes are cached now
    for given in (together, again):
        same(given, alone())


@pytest.mark.slow
def test_invariant_mode_also_holds_where_cpp_and_xla_compute_together():
    check(device_of(build(CONFIGS["mixture"]), MODE), 12, seed=5)


@pytest.mark.parametrize("weights", ["int4-g32", pytest.param("int8", marks=pytest.mark.slow)])
def test_nor_does_company_of_a_model_in_few_bits(weights):
    few = packed(model(), cast(Any, weights))
    limits = dataclasses.replace(LIMITS, prefix_cache=False)
    with Engine(few, limits=limits, buckets=(1, 4)) as engine:
        wanted = one_by_one(engine)
        same(engine.generate(PROMPTS, PARAMS), wanted)


def same(given: list, wanted: list) -> None:
    for one, meant in zip(given, wanted, strict=True):
        assert answer([one]) == meant
