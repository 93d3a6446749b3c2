"""The engine as callers see it: text and tokens, streams, ends, faults; for async code and any other."""

import asyncio
import dataclasses
import threading

import pytest

from maxstack.config import UserError
from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.generation import SamplingParams
from maxstack.serve import AsyncEngine, Engine
from maxstack.serve.errors import EngineDead
from maxstack.serve.request import Full
from tests.models.tiny import build
from tests.serve.driven import CONFIG, VOCAB, prompts
from tests.serve.driven import LIMITS as SHAPES

# A byte model that writes letters: its text is what the tokens say.
LETTERS = tuple((token, -100.0) for token in range(VOCAB) if not 97 <= token < 123)
PARAMS = SamplingParams(max_tokens=12, temperature=2.0, logit_bias=LETTERS)
LIMITS = dataclasses.replace(SHAPES, waiting=40)


@pytest.fixture(scope="module")
def engine():
    with Engine(build(CONFIG), byte_tokenizer(), limits=LIMITS, buckets=(1, 4)) as engine:
        engine.warm_up()
        yield engine


def test_text_in_text_out_and_stop_strings(engine):
    whole, other = engine.generate(["the quick brown", prompts(9, vocab=VOCAB)[0]], PARAMS)
    assert whole.text == bytes(whole.token_ids).decode()
    assert whole.prompt_token_ids[-5:] == tuple(b"brown")
    assert (len(whole.text), len(other.text), whole.finish_reason) == (12, 12, "length")
    stop = whole.text[5:8]
    [given] = engine.generate(["the quick brown"], dataclasses.replace(PARAMS, stop=("zzz", stop)))
    assert given.text == whole.text[: whole.text.index(stop)]
    assert given.finish_reason == "stop"
    several = engine.generate(["the quick brown"] * 2, [PARAMS, dataclasses.replace(PARAMS, seed=1)])
    assert several[0].text == whole.text != several[1].text


def test_a_stream_adds_up_to_the_answer_and_leaving_it_frees_its_pages(engine):
    asking = dataclasses.replace(PARAMS, logprobs=1)
    [whole] = engine.generate(["a stream"], asking)
    deltas = list(engine.stream("a stream", asking))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [one for delta in deltas for one in delta.logprobs] == whole.logprobs
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    stream = engine.stream("left early", dataclasses.replace(PARAMS, max_tokens=40))
    next(stream)
    stream.close()
    settle(engine)


def settle(engine: Engine) -> None:
    """Wait until the engine is idle, and see that nobody holds a page."""
    scheduler, idle = engine.asynchronous.scheduler, threading.Event()
    for _ in range(500):
        if scheduler.idle:
            break
        idle.wait(0.01)
    assert scheduler.idle
    assert scheduler.pages.available == LIMITS.pages
    assert not engine.asynchronous._open


def test_many_coroutines_at_once_get_what_each_gets_alone(engine):
    texts = [f"number {i}" for i in range(12)]
    alone = [engine.generate([text], PARAMS)[0].text for text in texts]

    async def one(text: str, leave: bool) -> str:
        whole = ""
        async for delta in engine.asynchronous.stream(text, PARAMS):
            whole += delta.text
            if leave:
                break
        return whole

    async def together() -> list[str]:
        return await asyncio.gather(*(one(text, i % 4 == 3) for i, text in enumerate(texts)))

    for i, (given, wanted) in enumerate(zip(asyncio.run(together()), alone, strict=True)):
        assert given == wanted or (i % 4 == 3 and wanted.startswith(given))
    settle(engine)


def test_what_cannot_be_served_is_refused_and_the_queue_is_bounded(engine):
    for prompt, params, part in (
        ([], PARAMS, "no tokens"), ([1] * 60, PARAMS, "exceed the model's 64"), ([VOCAB], PARAMS, "0 to 256"),
        ("x", [PARAMS, PARAMS], "1 prompts and 2 settings"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=part):
            engine.generate([prompt], params)
    with pytest.raises(Full, match="try again in"):
        engine.generate(["y"] * 80, PARAMS)
    settle(engine)
    [late] = engine.generate(["z"], PARAMS, deadline_s=0.0)
    assert (late.finish_reason, late.text) == ("deadline", "")


def test_nothing_is_compiled_after_ready_and_progress_is_told(engine):
    before = engine.asynchronous.progress.steps
    engine.generate(["count"], dataclasses.replace(PARAMS, top_p=0.5, logprobs=3, repetition_penalty=1.2))
    assert engine.asynchronous.compilations == 0
    assert engine.asynchronous.progress.steps > before
    settle(engine)
    assert engine.asynchronous.progress.stuck_for(1e9) == 0.0


def test_a_compilation_after_ready_is_counted(engine):
    import jax

    loop = engine.asynchronous._loop
    counted = threading.Event()

    def compile_something():
        jax.jit(lambda x: x * 3.25 - 1)(1.5)
        counted.set()
        return []

    loop._inbox.put(compile_something)
    assert counted.wait(10)
    assert engine.asynchronous.compilations == 1
    loop.compilations.count = 0


def test_a_closed_or_broken_engine_says_so(engine, monkeypatch):
    config = engine.asynchronous.config
    broken = AsyncEngine(build(config), limits=LIMITS, buckets=(1, 4))
    # Compiled already: the table of the other one serves the same shapes.
    broken._loop.device._programs = engine.asynchronous._loop.device._programs
    monkeypatch.setattr(broken._loop.device, "warm_up", lambda told: None)
    monkeypatch.setattr(broken._loop.device, "launch", lambda plan: {}[plan])
    caught = []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_type))
    with pytest.raises(EngineDead, match="KeyError"):
        asyncio.run(broken.complete([1, 2, 3], SamplingParams(max_tokens=4)))
    with pytest.raises(EngineDead, match="KeyError"):
        asyncio.run(broken.complete([1, 2, 3], SamplingParams(max_tokens=4)))
    broken._thread.join()
    assert caught == [KeyError]
