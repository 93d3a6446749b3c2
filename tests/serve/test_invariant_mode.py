"""Invariant mode on plain XLA: tokens and log-probabilities are the same to the last bit, whatever happens around."""

import asyncio
import dataclasses
import functools

import numpy as np
import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.kernels import cpu_native
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from maxstack.serve.choices import seed_of
from maxstack.serve.constrain import Constraint, Grammars
from maxstack.serve.embedding import Embedding
from maxstack.serve.invariant import check_rows
from maxstack.serve.plan import Limits
from tests.models.lora import write_adapter
from tests.models.tiny import CONFIGS, build
from tests.serve.driven import CONFIG, VOCAB, Driven, device_of, prompts
from tests.serve.test_mesh import on_mesh

pytestmark = pytest.mark.usefixtures("optimized")  # what the compiler does to sums is the point
LIMITS = Limits(
    rows=5, page=4, pages=64, max_length=64, chunks=((2, 8),), steps=(1, 2), tokens_a_step=21, invariant=True
)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, seed=7, logprobs=2)
PARAMS = [
    DRAWN, dataclasses.replace(DRAWN, temperature=0.0), dataclasses.replace(DRAWN, seed=8, top_k=30),
    dataclasses.replace(DRAWN, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1),
    dataclasses.replace(DRAWN, seed=9, min_p=0.02),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_cpp():
    """As on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native, "problem", lambda: "switched off")
        yield


def asks(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts, every second of which begins like others, and what is asked of each."""
    rng = np.random.default_rng(seed)
    rows = prompts(*rng.integers(1, 30, count), seed=seed)
    beginnings = prompts(17, 20, seed=100 + seed)
    rows = [beginnings[i // 2 % 2] + row[:9] if i % 2 else row for i, row in enumerate(rows)]
    lengths = rng.integers(1, 20, count).tolist()
    return [
        (row, dataclasses.replace(PARAMS[i % len(PARAMS)], max_tokens=length))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]


def told(answer) -> tuple:
    assert answer.error is None
    return answer.output.token_ids, answer.output.logprobs


def alone(device, asked: list) -> list[tuple]:
    return [told(Driven(device, prefix_cache=False).together([row], [own])[0]) for row, own in asked]


def in_company(device, asked: list, seed: int = 0, **changes) -> tuple[list[tuple], Driven]:
    """The same asked at any time, in any order."""
    run, rng, given = Driven(device, **changes), np.random.default_rng(seed), {}
    order = rng.permutation(len(asked)).tolist()

    def between() -> bool:
        for _ in range(rng.integers(0, 4)):
            if len(given) < len(asked):
                which = order[len(given)]
                given[which] = run.ask(*asked[which])
        return len(given) < len(asked)

    run.run(between)
    return [told(given[i]) for i in range(len(asked))], run


@functools.cache
def device(name: str = "", on: str = "cpu", kv: str = "float32", tensor: int = 1):
    model = build(CONFIGS[name] if name else CONFIG)
    where = device_of(model if tensor == 1 else on_mesh(model, tensor), LIMITS, on=on, kv_dtype=kv)
    check_rows(where)
    return where


COMPANIES = [{}, {"pages": 16}, {"pages": 16, "prefix_cache": False}, {"steps": (1,), "ahead": 1}]
FEWER = [{}, {"pages": 16, "prefix_cache": False}]


def check(where, count: int, seed: int, companies=COMPANIES):
    asked = asks(count, seed)
    wanted = alone(where, asked)
    preempted = cached = replayed = 0
    for i, changes in enumerate(companies):
        given, run = in_company(where, asked, seed=i, **changes)
        assert given == wanted
        counters = run.scheduler.counters
        preempted += counters.num_preemptions
        cached += counters.prefix_cache_hits
        replayed += counters.replayed_tokens
    assert preempted
    assert cached
    assert replayed


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = build(CONFIG)
    folder, _ = write_adapter(tmp_path_factory.mktemp("adapters") / "a", model, seed=1, rank=3)
    limits, slots = dataclasses.replace(LIMITS, invariant=False), AdapterSlots(count=1, rank=4)
    with Engine(model, byte_tokenizer(), limits=limits, invariant=True, adapters=slots) as engine:
        engine.warm_up()
        assert engine.asynchronous.limits.invariant
        engine.adapters.load("a", folder)
        yield engine
        assert engine.asynchronous.compilations == 0


def test_tokens_and_log_probabilities_are_the_same_bits_in_any_company(engine):
    # The engine has nothing to do meanwhile.
    check(engine.asynchronous._loop.device, 12, seed=1, companies=FEWER)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_requests_get_the_same_bits_in_any_company(seed):
    check(device(), 40, seed=10 + seed)


USUAL = dataclasses.replace(LIMITS, invariant=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "buckets", "company"),
    [
        (USUAL, (1, 5), {}),
        (dataclasses.replace(USUAL, chunks=((1, 8), (2, 16)), tokens_a_step=37), (5,), {}),
        (USUAL, (5,), {"pages": 16, "prefix_cache": False}),
        (USUAL, (5,), {}),
    ],
    ids=["few rows by themselves", "prompts in several shapes", "answers read like prompts", "answers shared"],
)  # fmt: skip
def test_with_one_rule_given_up_bits_differ(limits, buckets, company):
    where = device_of(build(CONFIG), limits, buckets=buckets)
    differ = 0
    for seed in range(20, 24):
        asked = asks(16, seed)
        wanted = alone(where, asked)
        if company or buckets != (5,) or limits is not USUAL:
            given, _ = in_company(where, asked, **company)
        else:
            # Each with its answer and a little more, once the answer's pages are named.
            follow = [
                ([*row, *tokens, 1, 2][:40], own)
                for (row, own), (tokens, _) in zip(asked, wanted, strict=True)
            ]
            wanted = alone(where, follow)
            run = Driven(where)
            run.together([row for row, _ in asked], [own for _, own in asked])
            given = [
                told(one) for one in run.together([row for row, _ in follow], [own for _, own in follow])
            ]
        differ += given != wanted
    assert differ


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "window", "latent", "mixture", "clamped mixture"])
def test_every_kind_of_layer_gets_the_same_bits_in_any_company(name):
    for on in ("cpu", "tpu"):
        check(device(name, on), 12, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"kv": "int8"}, {"kv": "int8", "on": "tpu"}, {"name": "grouped", "tensor": 2}]
)
def test_an_int8_cache_and_two_devices_give_the_same_bits_in_any_company(options):
    check(device(**options), 12, seed=4)


def test_siblings_scores_embeddings_and_adapters_are_the_same_bits_alone_and_together(engine):
    grammar = Grammars(byte_tokenizer(), VOCAB, engine.asynchronous.end_ids)
    bound = grammar.compile_now(Constraint("regex", "(red|green|blue){3}-[0-9]{3}"))
    grammar.close()
    rows = prompts(21, 13, 30, 9, seed=4)
    scored = dataclasses.replace(DRAWN, prompt_logprobs=2)

    async def everything(at_once: bool) -> list:
        ours = engine.asynchronous
        streams = [
            lambda: [stream.whole() for stream in ours.open_choices(rows[0], DRAWN, 3)],
            lambda: [ours.complete(rows[1], scored)],
            lambda: [ours.complete(rows[0], scored)],
            lambda: [ours.complete(rows[2], DRAWN, adapter="a")],
            lambda: [ours.complete(rows[3], DRAWN, constraint=bound)],
            lambda: [ours.embed(rows[2])],
            lambda: [ours.embed(rows[2], "last")],
        ]
        if at_once:
            return await asyncio.gather(*(one for some in streams for one in some()))
        return [await one for some in streams for one in some()]

    def bits(given) -> tuple:
        if isinstance(given, Embedding):
            return (given.vector.tobytes(),)
        return given.token_ids, given.logprobs, given.prompt_logprobs

    alone = [bits(one) for one in engine._wait(everything(at_once=False))]
    for _ in range(2):
        assert [bits(one) for one in engine._wait(everything(at_once=True))] == alone
    # Each of the siblings is what its seed gives alone.
    for i in range(3):
        [own] = engine.generate([rows[0]], dataclasses.replace(DRAWN, seed=seed_of(DRAWN.seed, i)))
        assert bits(own) == alone[i]


def test_an_engine_whose_rows_disagree_by_a_bit_does_not_start(engine, monkeypatch):
    device = engine.asynchronous._loop.device
    check_rows(device)
    run, nudged = device._run, []

    def other(key, given):
        said = run(key, given)
        if key[0] == "decode" and given.table_bp[nudged[-1], 0] >= 0:
            nearby = np.nextafter(np.asarray(said.logprobs_b), np.float32(1))
            said = said._replace(logprobs_b=said.logprobs_b.at[nudged[-1]].set(nearby[nudged[-1]]))
        return said

    monkeypatch.setattr(device, "_run", other)
    for row in (2, 4):
        nudged.append(row)
        with pytest.raises(RuntimeError, match=f"row {row} of 5"):
            check_rows(device)
    monkeypatch.undo()
    check_rows(device)


def test_sizes_with_which_a_token_could_be_computed_in_two_ways_are_refused():
    for changes, words in (
        ({"drafts": 2, "tokens_a_step": 40}, "drafts 2 in invariant mode: guesses are read in steps of another shape"),
        ({"chunks": ((1, 8), (2, 8))}, "all prompts are read in one shape"),
        ({"chunks": ((4, 8, 8),)}, "all prompts are read in one shape"),
        ({"page": 3}, "chunks of 8 tokens and pages of 3 in invariant mode"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(LIMITS, **changes)
