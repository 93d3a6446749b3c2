"""Clocks that jump: no request is lost, no page is kept, nothing else fails."""

import asyncio
import dataclasses
import time

import pytest

from maxstack.models.generation import SamplingParams
from maxstack.serve.operate.metrics import of_counters
from tests.serve.operate.pretend import LIMITS, engine

PARAMS = SamplingParams(max_tokens=20, temperature=0.0)


class Jumping:
    """Real time, and what a test adds to it."""

    def __init__(self):
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_requests_go_on_when_the_clock_jumps_and_later_ones_are_taken(jump):
    clock = Jumping()
    with engine(clock=clock) as (made, device):
        device.takes_s = 0.01

        async def work() -> None:
            streams = [made.open([1, 2, i], PARAMS) for i in range(6)]
            await streams[0].next()
            clock.offset = jump
            later = [made.open([1, 3, i], PARAMS) for i in range(2)]
            for stream in (*streams, *later):
                output = await stream.whole()
                assert (output.finish_reason, len(output.token_ids)) == ("length", 20)
            assert list(of_counters(made.scheduler.counters, "tiny"))

        asyncio.run(asyncio.wait_for(work(), 60))
        assert made.scheduler.idle
        assert made.scheduler.pages.available == LIMITS.pages


def test_a_deadline_that_a_jump_has_passed_ends_its_request_and_no_other():
    clock = Jumping()
    with engine(clock=clock) as (made, device):
        device.takes_s = 0.01

        async def work() -> None:
            hurried = made.open([1, 2, 3], dataclasses.replace(PARAMS, max_tokens=50), deadline_s=3600.0)
            patient = made.open([4, 5, 6], PARAMS)
            await hurried.next()
            clock.offset = 7200.0
            assert (await hurried.whole()).finish_reason == "deadline"
            assert (await patient.whole()).finish_reason == "length"

        asyncio.run(asyncio.wait_for(work(), 60))
        assert made.scheduler.pages.available == LIMITS.pages
