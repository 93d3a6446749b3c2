"""Where the time went: nested timers, sums over restarts."""

import json
import time

import pytest

from maxstack.telemetry import ACTIVITIES, Goodput


class Clock:
    """Stands in for time.perf_counter."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_inner_timers_stop_the_outer_one_and_parts_add_up_to_the_wall_time(clock):
    goodput = Goodput()
    clock.now += 1
    with goodput.measure("evaluate"):
        clock.now += 2
        with goodput.measure("save"):
            clock.now += 4
        clock.now += 8
    goodput.add("data", 0.5)
    clock.now += 16
    seconds = goodput.seconds()
    assert seconds["evaluate"] == 10
    assert seconds["save"] == 4
    assert seconds["idle"] == 16.5
    assert sum(seconds.values()) == goodput.wall_seconds == 31
    assert sum(goodput.shares().values()) == pytest.approx(1)


def test_a_timer_that_still_runs_is_counted(clock):
    goodput = Goodput()
    with goodput.measure("compile"):
        clock.now += 3
        assert goodput.seconds()["compile"] == 3
        clock.now += 1
    assert goodput.seconds()["compile"] == 4


def test_an_error_inside_ends_the_timer(clock):
    goodput = Goodput()

    def fail() -> None:
        with goodput.measure("save"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5
    assert goodput.seconds()["save"] == 2


def test_a_resumed_run_adds_to_the_sums_and_not_the_pause(clock, tmp_path):
    path = tmp_path / "run" / "goodput.json"
    first = Goodput(path)
    with first.measure("step"):
        clock.now += 10
    clock.now += 1
    first.save()
    clock.now += 1000
    second = Goodput(path)
    with second.measure("step"):
        clock.now += 5
    second.save()
    report = json.loads(path.read_text())
    assert report["seconds"]["step"] == 15
    assert report["seconds"]["idle"] == 1
    assert (report["wall_seconds"], report["starts"]) == (16, 2)
    assert set(report["shares"]) == set(ACTIVITIES)


def test_steps_that_a_crash_took_are_booked_as_lost(clock, tmp_path):
    goodput = Goodput()
    goodput.add("step", 10.0)
    goodput.move("step", "lost", 3.0)
    assert (goodput.seconds()["step"], goodput.seconds()["lost"]) == (7, 3)
    goodput.move("step", "lost", 100.0)
    assert (goodput.seconds()["step"], goodput.seconds()["lost"]) == (0, 10), "never more than there is"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": 3}'])
def test_an_unreadable_file_counts_as_none(tmp_path, content):
    path = tmp_path / "goodput.json"
    path.write_text(content)
    goodput = Goodput(path)
    goodput.save()
    assert goodput.starts == 1


def test_unknown_activities_are_refused():
    with pytest.raises(ValueError, match="activity must be one of compile, data, step"):
        Goodput().add("coffee", 1.0)
    with pytest.raises(ValueError, match="idle"), Goodput().measure("idle"):
        pass
