"""Hours in short: clients of all kinds on one engine whose device fails now and then, and nothing is lost, wrong or
left over.

The normal run takes MAXSTACK_SOAK_S seconds (10); with `-m slow` there are 60 of them, and MAXSTACK_SOAK_S=1200 makes
it 20 minutes.
"""

import asyncio
import dataclasses
import gc
import logging
import os
import time
from collections import Counter
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import psutil
import pytest

from maxstack.models.generation import SamplingParams
from maxstack.serve import AsyncEngine
from maxstack.serve.errors import NotFinite, StepFailed
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, prompts

SECONDS = float(os.environ.get("MAXSTACK_SOAK_S", "10"))
CLIENTS = 10
POISON = 200
"""A token whose embedding is no number: whoever has it in the prompt, and nobody else, fails."""
FAULTS = (
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."),
    RuntimeError("INTERNAL: the device has failed"),
    ValueError("a buffer was deleted or donated"),
    MemoryError(),
)
EVERY = 120
"""Plans between two faults, in the mean."""
GROWN_BYTES, GROWN_OBJECTS = 48e6, 0.03


class FailingDevice:
    """A device of which some calls fail, before the work or after it, and take the donated cache along."""

    def __init__(self, device, random: Random):
        self._device, self._random = device, random
        self.failing, self.failed = False, 0

    def __getattr__(self, name: str):
        return getattr(self._device, name)

    def _perhaps_fail(self) -> None:
        if self.failing and self._random.random() < 1 / EVERY:
            self.failed += 1
            for array in jax.tree.leaves((self._device._pools, self._device._state)):
                array.delete()
            fault = self._random.choice(FAULTS)
            raise type(fault)(*fault.args)  # anew: one that is raised again and again keeps every traceback

    def launch(self, plan):
        self._perhaps_fail()
        launched = self._device.launch(plan)
        self._perhaps_fail()
        return launched

    def results(self, launched):
        found = self._device.results(launched)
        self._perhaps_fail()
        return found


class Counting(logging.Filter):
    """Lets nothing pass, and counts it."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += 1
        return False


@pytest.fixture(scope="module", autouse=True)
def logged():
    """The engine's log, kept from pytest, which keeps every record with its traceback: that would be a leak."""
    log, counting = logging.getLogger("maxstack.serve.loop"), Counting()
    log.addFilter(counting)
    yield counting
    log.removeFilter(counting)


@pytest.fixture(scope="module")
def engine():
    model = build(CONFIG)
    table = model.embedding.table[...]
    model.embedding.table[...] = table.at[POISON].set(jnp.nan)
    # Few pages for the rows that there are: somebody is preempted all the time.
    limits = dataclasses.replace(LIMITS, pages=36, waiting=200, retries=2)
    engine = AsyncEngine(model, limits=limits, buckets=(1, 4))
    failing: Any = FailingDevice(engine._loop.device, Random(3))
    engine._loop.device = failing
    engine.warm_up()
    yield engine
    engine.close()


SHARED = prompts(12, seed=9)[0]
ASKED = [*prompts(3, 9, 17, 26, seed=4), *([*SHARED, *rest] for rest in prompts(2, 5, 11, seed=5))]
BIAS = ((POISON, -100.0),)


def params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, logit_bias=BIAS)


class Soak:
    """Clients, and what became of their requests."""

    def __init__(self, engine: AsyncEngine, expected: list[list[int]]):
        self.engine, self.expected, self.ends = engine, expected, Counter()

    async def client(self, random: Random, until: float) -> None:
        kinds = (self.whole, self.whole, self.whole, self.leaving, self.late, self.poisoned)
        while time.monotonic() < until:
            which = random.randrange(len(ASKED))
            try:
                end = await random.choice(kinds)(random, which)
            except StepFailed:
                end = "failed"
            self.ends[end] += 1

    async def whole(self, random: Random, which: int) -> str:
        tokens = random.randint(1, 24)
        output = await self.engine.complete(ASKED[which], params(tokens), priority=random.randint(-2, 2))
        assert output.token_ids == self.expected[which][:tokens]
        return "whole"

    async def leaving(self, random: Random, which: int) -> str:
        heard, left = [], random.randint(0, 8)
        async for delta in self.engine.stream(ASKED[which], params(24)):
            heard += delta.token_ids
            if len(heard) >= left:
                break
        assert heard == self.expected[which][: len(heard)]
        return "left"

    async def late(self, random: Random, which: int) -> str:
        output = await self.engine.complete(ASKED[which], params(24), deadline_s=random.uniform(0.0, 0.05))
        assert output.token_ids == self.expected[which][: len(output.token_ids)]
        return "late"

    async def poisoned(self, random: Random, which: int) -> str:
        at = random.randrange(len(ASKED[which]))
        with pytest.raises((NotFinite, StepFailed)) as raised:
            await self.engine.complete([*ASKED[which][:at], POISON], params(8))
        return type(raised.value).__name__

    async def run(self, seconds: float, seed: int) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client(Random(seed + i), until) for i in range(CLIENTS)))


def held() -> tuple[int, int]:
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())


async def soak(engine: AsyncEngine, seconds: float) -> Soak:
    """A fifth of the time to get going, the rest under watch."""
    device = engine._loop.device
    expected = [(await engine.complete(prompt, params(24))).token_ids for prompt in ASKED]
    made, device.failing = Soak(engine, expected), True
    await made.run(seconds / 5, seed=100)
    before = held()
    await made.run(4 * seconds / 5, seed=200)
    device.failing = False
    after = held()
    grown = after[0] - before[0], after[1] - before[1]
    print(f"{seconds:.0f} s: {grown} bytes and objects more, {device.failed} faults, {dict(made.ends)}")
    assert grown[0] < GROWN_BYTES
    assert grown[1] < before[1] * GROWN_OBJECTS
    for prompt, tokens in zip(ASKED, expected, strict=True):  # it is as it was
        assert (await engine.complete(prompt, params(24))).token_ids == tokens
    return made


def check(engine: AsyncEngine, made: Soak, logged: Counting) -> None:
    """Everything happened that was to happen, and nothing is left of it."""
    counters, device = engine.scheduler.counters, engine._loop.device
    assert {"whole", "left", "late", "NotFinite"} <= made.ends.keys()
    assert device.failed > 0
    assert logged.count >= device.failed
    assert counters.cache_losses == device.failed
    assert counters.num_preemptions > 0
    assert engine.dead is None
    assert engine.compilations == 0
    for _ in range(500):
        if engine.scheduler.idle:
            break
        time.sleep(0.01)
    assert engine.scheduler.idle
    assert engine.scheduler.pages.available == engine.limits.pages
    assert not engine._open
    assert not engine._loop._known


def test_a_soak_leaves_nothing_wrong_or_over(engine, logged):
    check(engine, asyncio.run(soak(engine, SECONDS)), logged)


@pytest.mark.slow
def test_a_longer_soak_leaves_nothing_wrong_or_over(engine, logged):
    check(engine, asyncio.run(soak(engine, max(SECONDS, 60.0))), logged)
