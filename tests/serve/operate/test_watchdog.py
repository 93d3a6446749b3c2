"""A stuck or dead engine is seen within the stated time; a busy one never is."""

import asyncio
import dataclasses

import pytest

from maxstack.models.generation import SamplingParams
from maxstack.serve.errors import EngineDead, StepFailed
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.watchdog import FAILURES, Watchdog
from tests.serve.operate.pretend import engine

PARAMS = SamplingParams(max_tokens=4, temperature=0.0)


class Clock:
    """Time that a test makes pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Counted:
    steps: int = 0
    failed: int = 0


@dataclasses.dataclass
class Pretended:
    progress: Counted = dataclasses.field(default_factory=Counted)
    has_work: bool = True
    dead: BaseException | None = None


def ticks(watchdog: Watchdog, clock: Clock, seconds: float, every: float = 1.0) -> None:
    for _ in range(int(seconds / every)):
        clock.now += every
        watchdog.look()


def made(**changes) -> tuple[Watchdog, Pretended, Clock]:
    clock, engine = Clock(), Pretended(**changes)
    return Watchdog(engine, limit_s=60.0, clock=clock), engine, clock


def test_an_engine_that_gets_nothing_done_is_stuck_after_the_limit_and_well_when_it_goes_on():
    watchdog, engine, clock = made()
    ticks(watchdog, clock, 60)
    assert watchdog.fault is None
    ticks(watchdog, clock, 1)
    assert watchdog.fault is not None
    assert watchdog.fault[0] == "stuck"
    assert "61 s" in watchdog.fault[1]
    engine.progress.steps += 1
    ticks(watchdog, clock, 1)
    assert watchdog.fault is None


def test_one_that_is_busy_for_ever_is_well_as_long_as_its_steps_get_done():
    watchdog, engine, clock = made()
    for _ in range(200):
        ticks(watchdog, clock, 50)  # a long prompt on a slow machine: each step takes most of the limit
        engine.progress.steps += 1
        assert watchdog.fault is None


def test_one_that_has_nothing_to_do_is_well():
    watchdog, engine, clock = made(has_work=False)
    ticks(watchdog, clock, 10_000)
    assert watchdog.fault is None
    engine.has_work = True  # the rest counts for nothing
    ticks(watchdog, clock, 60)
    assert watchdog.fault is None


def test_a_machine_whose_steps_are_slow_has_a_longer_limit():
    watchdog, engine, clock = made()
    ticks(watchdog, clock, 30)
    engine.progress.steps += 1
    ticks(watchdog, clock, 299)
    assert watchdog.limit_s == 300
    assert watchdog.fault is None
    ticks(watchdog, clock, 10)
    assert watchdog.fault is not None


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_neither_a_jump_of_the_clock_nor_a_suspended_machine_makes_it_stuck(jump):
    watchdog, _, clock = made()
    ticks(watchdog, clock, 5)
    clock.now += jump
    ticks(watchdog, clock, 5)
    assert watchdog.fault is None
    assert watchdog.stalled_s < 15


def test_steps_that_fail_one_after_another_are_a_fault_and_one_that_does_not_ends_it():
    watchdog, engine, clock = made()
    for failed in range(1, FAILURES):
        engine.progress.failed = failed
        ticks(watchdog, clock, 20)
        assert watchdog.fault is None
    engine.progress.failed = FAILURES
    watchdog.look()
    assert watchdog.fault is not None
    assert watchdog.fault[0] == "failing"
    engine.progress = Counted(steps=1)
    assert watchdog.fault is None


def test_new_weights_may_take_their_time():
    watchdog, _, clock = made()
    with watchdog.patient():
        ticks(watchdog, clock, 1000)
        assert watchdog.fault is None
    ticks(watchdog, clock, 61)
    assert watchdog.fault is not None


def test_a_device_that_hangs_is_seen_and_one_that_is_slow_is_not():
    with engine() as (made, device):
        watchdog = Watchdog(made, limit_s=0.3, tick_s=0.1)

        async def slow() -> None:
            device.takes_s = 0.02
            watching = asyncio.create_task(watchdog.watch())
            await made.complete(
                [1, 2, 3], dataclasses.replace(PARAMS, max_tokens=30)
            )  # longer than the limit
            assert watchdog.fault is None
            device.takes_s = 0.0
            device.go_on.clear()
            stream = made.open([4, 5, 6], PARAMS)
            while watchdog.fault is None:
                await asyncio.sleep(0.05)
            assert watchdog.fault[0] == "stuck"
            device.go_on.set()
            await stream.whole()
            await asyncio.sleep(0.2)
            assert watchdog.fault is None
            watching.cancel()

        asyncio.run(asyncio.wait_for(slow(), 60))


def test_a_device_that_always_fails_is_seen_and_so_is_an_engine_that_has_died(monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)

    async def ask(made) -> None:
        await made.complete([1, 2, 3], PARAMS)

    with engine() as (made, device):
        watchdog = Watchdog(made)
        device.fails = RuntimeError("the device is gone")
        for _ in range(FAILURES):
            with pytest.raises(StepFailed):
                asyncio.run(ask(made))
        assert watchdog.fault is not None
        assert watchdog.fault[0] == "failing"
        device.fails = None
        asyncio.run(ask(made))
        assert watchdog.fault is None
        device.fails = KeyError("a fault of ours")
        with pytest.raises(EngineDead):
            asyncio.run(ask(made))
        assert watchdog.fault is not None
        assert watchdog.fault[0] == "dead"
        assert "KeyError" in watchdog.fault[1]


def test_the_limit_fits_the_model_unless_it_is_told():
    with engine() as (made, _):
        for told, slow_step_s, limit_s in ((None, 0.0, 60.0), (None, 600.0, 600.0), (5.0, 600.0, 5.0)):
            operation = Operation("tiny", stuck_after_s=told)
            operation.attach(made, slow_step_s)
            assert operation.watchdog.limit_s == limit_s
