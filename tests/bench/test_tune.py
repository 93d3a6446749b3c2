"""`maxstack bench kernels --tune`: what is faster is kept, what is wrong never is, no turn is wasted. A clock that only
the fake programs move tells the time."""

import dataclasses
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxstack.bench import kernels as cases
from maxstack.bench.command import main
from maxstack.bench.measure import Case, Program, prepared
from maxstack.bench.tune import race
from maxstack.bench.tune.command import main as tune_all
from maxstack.bench.tune.kept import keep, sentence, table
from maxstack.bench.tune.race import Effort
from maxstack.bench.tune.results import apart
from maxstack.bench.tune.search import Found, outward, tuned
from maxstack.config import UserError
from maxstack.kernels import Unsupported, tiles
from maxstack.kernels.attention import attention

BLOCKS = (1, 2, 4, 8)
"""2 is the rule's; 8 is refused."""
KEY = "toy cpu float32 t{}"


def asked_block(t: int) -> int:
    def fault(sizes):
        return "8 is too many" if sizes["block"] == 8 else None

    return tiles.chosen("toy", "float32", {"t": t}, {"block": 2}, axes={"block": BLOCKS}, fault=fault)[
        "block"
    ]


class World:
    """A clock, and programs whose calls take what `seconds` says by block: a number, or one for each call."""

    def __init__(self, seconds, *, compiling=None, programs=None, compiled=None, interrupted_at=math.inf):
        self.now, self.calls, self.compilations = 0.0, [], []
        self.seconds, self.compiling = seconds, compiling or {}
        self.programs, self.machine_code = programs or {}, compiled or {}
        self.interrupted_at = interrupted_at

    def clock(self) -> float:
        return self.now

    def effort(self, **options) -> Effort:
        return Effort(**{"rounds": 5, "least_seconds": 1.0, "clock": self.clock} | options)

    def case(self, *lengths: int) -> Case:
        """A contender with a request for each length, of which the last tells how fast it is."""
        make = lambda: Fake(self, [asked_block(t) for t in lengths])  # noqa: E731
        return Case(kernel="toy", shape=f"{lengths} numbers", contenders={"ours": make})

    def found(self, **options) -> Found:
        (found,) = tuned(self.case(1), effort=self.effort(**options), done={})
        return found


class Fake(Program):
    def __init__(self, world: World, blocks: list[int]):
        self.world, self.block = world, max(blocks, key=lambda block: block != 2)

    def traced(self):
        return f"traced {self.world.programs.get(self.block, self.block)}"

    def compiled(self):
        return f"compiled {self.world.machine_code.get(self.block, self.block)}"

    def compile(self) -> Any:
        self.world.compilations.append(self.block)
        self.world.now += self.world.compiling.get(self.block, 1.0)

    def __call__(self):
        told = self.world.seconds[self.block]
        self.world.now += told if isinstance(told, float) else next(told)
        self.world.calls.append(self.block)
        if len(self.world.calls) >= self.world.interrupted_at:
            raise KeyboardInterrupt
        return jnp.zeros(())


def test_what_is_faster_is_found_and_confirmed():
    world = World({1: 0.9, 2: 1.0, 4: 0.5})
    found = world.found()
    assert found.best == {"block": 4}
    assert found.ratio == pytest.approx(2.0)
    assert found.tried == 2
    assert found.dropped == ("block 8: 8 is too many",)
    assert found.untried == ()


def test_what_is_clearly_slower_gets_one_turn():
    world = World({1: 3.0, 2: 1.0, 4: 1.2})
    found = world.found()
    assert (found.best, found.tried) == (None, 1)
    assert found.dropped[1] == "block 1: its first turn took 3.0 times the default's"
    assert world.calls.count(1) == 2  # the call whose results are compared, and the turn
    assert world.calls.count(4) == 3  # two turns of three that are lost decide


def test_a_best_that_may_be_luck_costs_nobody_its_second_turn():
    world = World({1: 1.0, 2: 1.0, 4: 0.25})
    assert world.found().best == {"block": 4}
    assert world.calls.count(1) == 3


def test_what_would_win_is_not_dropped_for_a_first_turn_that_other_work_slowed():
    own = [
        1.0,
        3.9,
        *[1.0] * 50,
    ]  # of 4: the compared call, then a first turn nearly twice as long as the default's
    assert World({1: 9.0, 2: 2.0, 4: iter(own)}).found().best == {"block": 4}
    # What slows the machine for longer shows in the default's turns around it.
    default = [2.0, 2.0, 2.0, 8.0, *[2.0] * 50]
    own = [1.0, 8.0, *[1.0] * 50]
    assert World({1: 9.0, 2: iter(default), 4: iter(own)}).found().best == {"block": 4}


def test_what_is_not_sure_to_be_faster_is_not_kept():
    # In the last comparison it loses 3 of 10 rounds, of which the tenth is not made.
    own = [0.5] * 4 + [0.5] + [0.5] * 6 + [1.5] * 9
    world = World({1: 9.0, 2: 1.0, 4: iter(own)})
    assert world.found(least_seconds=0.5).best is None
    assert world.calls.count(4) == 4 + 1 + 9
    # In the first comparison it was faster by luck, and is by less than LEAST_GAIN.
    own = [0.5] * 4 + [0.99] * 11
    assert World({1: 9.0, 2: 1.0, 4: iter(own)}).found(least_seconds=0.5).best is None
    assert World({1: 0.98, 2: 1.0, 4: 0.99}).found().best is None


def test_long_turns_are_compared_in_half_the_rounds():
    calls = []
    for times in (1.9, 2.1):
        world = World({1: 20.0, 2: times, 4: 1.0})
        assert world.found().best == {"block": 4}
        calls.append(world.calls.count(4))
    assert calls == [4 + 1 + 10, 4 + 1 + 5]


def test_short_calls_fill_a_turn():
    world = World({1: 0.25, 2: 0.1, 4: 0.34})
    world.found()
    # The compared call, one that tells how many fill a second, and a turn.
    assert world.calls.count(1) == 1 + 1 + 4
    assert world.calls.count(4) == 1 + 1 + 3


def test_the_same_program_is_neither_compiled_nor_timed_again():
    world = World({1: 0.5, 2: 1.0, 4: 0.5}, programs={4: 2})
    found = world.found()
    assert found.dropped[0] == "block 4: the same program as with the default"
    assert 4 not in world.compilations + world.calls
    world = World({1: 0.5, 2: 1.0, 4: 0.5}, compiled={1: 4})
    found = world.found()
    assert found.best == {"block": 4}
    assert found.dropped[1] == "block 1: the same program as with block 4"
    assert 1 in world.compilations
    assert 1 not in world.calls


def test_sizes_beyond_one_that_takes_long_to_compile_are_not_compiled(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", (1, 2, 4, 5, 6))
    world = World({1: 0.5, 2: 1.0, 4: 0.5, 5: 0.5, 6: 0.5}, compiling={4: 61.0, 5: 100.0})
    found = world.found()
    assert found.dropped == tuple(f"block {b}: the one before took too long to compile" for b in (5, 6))
    assert world.compilations == [2, 4, 1]
    # Where all take long it is the shape.
    world = World(world.seconds, compiling=dict.fromkeys((1, 2, 4, 5, 6), 61.0))
    assert world.found().dropped == ()


def test_candidates_go_outward():
    assert outward((1, 2, 4, 8, 16), 4) == [8, 16, 2, 1]
    assert outward((8, 1), 4) == [8, 1]


def test_when_the_time_is_over_what_is_best_so_far_is_compared_once_more_and_kept(user):
    world = World({1: 0.1, 2: 1.0, 4: 0.5})
    found = world.found(until=5.0)  # after 4 was compiled
    assert found.best == {"block": 4}
    assert found.untried == ("block 8", "block 1")
    assert "not tried: block 8, block 1" in sentence(found)
    keep([found], user)
    assert tiles.read(user)[KEY.format(1)]["sizes"] == {"block": 4}
    # A line that is there already stays: it may be of a search that was not ended.
    keep([dataclasses.replace(found, best={"block": 1}, ratio=9.0)], user)
    assert tiles.read(user)[KEY.format(1)]["sizes"] == {"block": 4}
    found = World({}).found(until=-1.0)
    assert (found.best, found.untried) == (None, ("block 4", "block 8", "block 1"))
    keep([found], user)
    assert tiles.read(user)[KEY.format(1)]["sizes"] == {"block": 4}


def test_ctrl_c_keeps_what_was_found_and_says_what_was_not_tried(user, capsys):
    whole = World({1: 0.9, 2: 1.0, 4: 0.5})
    whole.found()
    world = World(whole.seconds, interrupted_at=len(whole.calls) + 9)  # while the second request is tuned
    file = user.with_name("all.json")
    assert tune_all([world.case(1), world.case(2, 3), world.case(4)], world.effort(), file) == 130
    assert list(tiles.read(user)) == [KEY.format(1)]
    out, err = capsys.readouterr()
    assert "not tried: toy, (4,) numbers" in out
    assert f"| {KEY.format(2)} | block 2 | not known | 1.00 |" in out
    assert (
        f"{KEY.format(3)}: nothing to keep (0 timed, 0 dropped, 0 s); not tried: block 4, block 8, block 1"
        in err
    )
    found = json.loads(file.read_text())
    assert found["not_tried"] == ["toy, (4,) numbers"]
    assert [bool(each["untried"]) for each in found["found"]] == [False, True, True]


def test_what_looked_best_when_it_was_stopped_is_said_and_not_kept():
    world = World({1: 9.0, 2: 1.0, 4: 0.5})

    def stop():  # Ctrl-C while 1 is called for the first time
        raise KeyboardInterrupt
        yield

    world.seconds[1] = stop()
    stopped = tuned(world.case(1), effort=world.effort(), done={})
    found = next(stopped)
    assert (found.best, found.tried) == (None, 1)
    assert found.untried == ("block 1", "once more block 4, which looked 2.00 times as fast")
    with pytest.raises(KeyboardInterrupt):
        next(stopped)


def test_cases_that_there_was_no_time_for_are_said(user, capsys):
    world = World({1: 0.9, 2: 1.0, 4: 0.5})
    assert tune_all([world.case(1), world.case(2)], world.effort(until=0.0), None) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[2:4] == ["not tried: toy, (1,) numbers", "not tried: toy, (2,) numbers"]
    assert err.splitlines() == ["the time is over"]


def test_what_is_being_tried_and_each_result_are_said_at_once(user, capsys, monkeypatch):
    world = World({1: 0.9, 2: 1.0, 4: 0.5})
    kept = []  # of the table, when the second request begins
    second = world.case(2)
    make = second.contenders["ours"]
    second.contenders["ours"] = lambda: kept.append(dict(tiles.read(user))) or make()
    assert tune_all([world.case(1), second], world.effort(), None) == 0
    assert list(kept[0]) == [KEY.format(1)]
    said = capsys.readouterr().err.splitlines()
    took = said[4].split()[-2]
    one = f"1 of 2: toy, (1,) numbers: {KEY.format(1)}"
    assert said[:7] == [
        f"{one}: compiling",
        f"{one}: block 4: compiling, 2 left",
        f"{one}: block 1: compiling, 0 left; best so far block 4 (2.00 times as fast)",
        f"{one}: block 4: once more, 0 left; best so far block 4 (2.00 times as fast)",
        f"{KEY.format(1)}: block 4 is 2.00 times as fast as the default, kept (2 timed, 1 dropped, {took} s)",
        "  dropped block 8: 8 is too many",
        f"2 of 2: toy, (2,) numbers: {KEY.format(2)}: compiling",
    ]


def test_a_case_without_sizes_and_one_that_is_not_served_say_so(user, capsys):
    def refuse():
        raise Unsupported("no such chip")

    plain = Case(kernel="plain", shape="x", contenders={"ours": lambda: prepared(jnp.sin, jnp.ones(3))})
    refused = Case(kernel="refused", shape="y", contenders={"ours": refuse})
    assert tune_all([plain, refused], Effort(), None) == 0
    said = capsys.readouterr().err
    assert "plain, x: nothing to try: what serves it has no sizes" in said
    assert "refused, y: not tuned: no such chip" in said


def toy(x, wrong=(), refused=()):
    """A sum; `wrong` blocks change its result, `refused` ones do not compile."""
    block = asked_block(x.size)
    if block in refused:
        raise ValueError(f"no room for {block}\nand more")
    return jnp.sum(x.reshape(-1, block)) * (1.01 if block in wrong else 1.0)


def real(**options) -> Found:
    x = jnp.arange(64.0)
    call = lambda: prepared(lambda x: toy(x, **options), x)  # noqa: E731
    case = Case(kernel="toy", shape="64 numbers", contenders={"ours": call})
    (found,) = tuned(case, effort=Effort(rounds=1, least_seconds=0.0), done={})
    return found


def test_a_candidate_with_other_results_is_not_taken():
    found = real(wrong=(1, 4))
    assert (found.best, found.ratio, found.tried) == (None, 1.0, 0)
    assert "block 4: other results than the default's: by 20 of 2e+03" in found.dropped


def test_a_candidate_that_does_not_compile_is_passed_over():
    found = real(refused=(1,), wrong=(4,))
    assert "block 1: no room for 1" in found.dropped


def test_a_trace_that_did_not_ask_again_is_no_candidate():
    x, asked = jnp.arange(8.0), []

    def stale(x):
        if not asked:
            asked.append(True)
            return toy(x)
        return jnp.sum(x)

    stuck = Case(kernel="toy", shape="", contenders={"ours": lambda: prepared(stale, x)})
    (found,) = tuned(stuck, effort=Effort(rounds=1, least_seconds=0.0), done={})
    assert found.tried == 0
    assert "did not ask again" in found.dropped[0]


def test_results_are_compared_where_they_are_finite():
    a = jnp.array([1.0, -jnp.inf, 3.0])
    assert apart(a, a) is None
    assert apart(a.at[0].add(5e-4), a) is None  # a sixth of a thousandth of the largest: below 2**-12
    assert apart(a.at[0].add(1e-2), a) == "by 0.01 of 3"
    assert apart(a.at[1].set(0), a) == "not finite in other places"
    assert apart(a.at[2].set(jnp.nan), a) == "not finite in other places"


@pytest.fixture
def user(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(tiles.SWITCH, str(file))
    tiles.forget()
    yield file
    tiles.forget()


def test_the_verb_fills_the_users_table_which_kernels_then_take(user, monkeypatch, capsys):
    world = World({1: 0.9, 2: 1.0, 4: 0.5})
    monkeypatch.setattr(cases, "CASES", {"toy": lambda: iter([world.case(2048)])})
    monkeypatch.setattr("time.perf_counter", world.clock)
    monkeypatch.setattr(race, "Effort", lambda **options: world.effort(**options))
    file = user.with_name("all.json")
    assert main(["kernels", "--tune", "--rounds", "3", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"| {KEY.format(2048)} | block 2 | block 4 | 2.00 | 2 | 1 | 0 |" in said
    assert f"1 of 1 are faster than the default; {user} has 1 lines" in said
    (line,) = tiles.read(user).values()
    assert line["sizes"] == {"block": 4}
    assert "times as fast as the default" in line["source"]
    assert json.loads(file.read_text())["found"][0]["best"] == {"block": 4}
    with tiles.asked() as requests:
        jax.eval_shape(toy, jnp.zeros(2048))
    assert requests[KEY.format(2048)].current == {"block": 4}
    # Another table's lines stay, and one of a default that is best again goes.
    keep([Found(case=world.case(1), request=requests[KEY.format(2048)], tried=1)], user)
    assert tiles.read(user) == {}


def test_a_file_that_is_no_table_is_not_overwritten(user, monkeypatch):
    user.parent.mkdir()
    user.write_text("mine")
    with pytest.raises(
        UserError, match=r"tiles.json: it is no JSON .*; move it away, or name another with MAXSTACK_TILES"
    ):
        main(["kernels", "--tune", "--only", "attention"])
    assert user.read_text() == "mine"
    monkeypatch.setenv(tiles.SWITCH, "")
    with pytest.raises(UserError, match="MAXSTACK_TILES is empty, so there is no table to fill"):
        main(["kernels", "--tune", "--only", "attention"])


@pytest.mark.parametrize(
    "words", [["--minutes", "5"], ["--tune", "--minutes", "0"], ["--tune", "--minutes", "nan"]]
)
def test_minutes_are_a_time_for_tuning(words):
    with pytest.raises(UserError, match=f"--minutes {words[-1]}: it is a time above 0 for --tune"):
        main(["kernels", *words])


def test_a_real_kernel_is_tuned(monkeypatch):
    """Attention of few tokens: both passes, each of its sizes; the passes do not disturb each other."""
    # Of ones alone the gradients would be what rounding leaves of sums that cancel.
    q = jax.random.normal(jax.random.key(0), (1, 32, 2, 8))
    kv = jax.random.normal(jax.random.key(1), (1, 32, 1, 8))

    def gradients(q, k, v):
        return jax.grad(lambda *each: jnp.sum(attention(*each) ** 2), (0, 1, 2))(q, k, v)

    small = Case(
        kernel="attention", shape="32 tokens", contenders={"ours": lambda: prepared(gradients, q, kv, kv)}
    )
    monkeypatch.setattr("maxstack.kernels.attention.blocks.AXES", {"query": (16, 4, 512)})
    monkeypatch.setattr(race, "CLEARLY", math.inf)
    found = list(tuned(small, effort=Effort(rounds=1, least_seconds=0.0), done={}))
    assert [each.request.kernel for each in found] == ["attention.xla.forward", "attention.xla.backward"]
    for each in found:
        assert each.tried == 1
        assert each.dropped[0] == "query 512: the same program as with the default"
        assert "blocks are of 8 positions at least" in each.dropped[1]
    assert table(found).count("\n") == 3
