"""The search for the sizes of one kernel at one shape.

A case's own contender is traced once to see what its kernels ask for (`kernels/tiles.py`). For each that has sizes
worth trying, one size after another is varied. A candidate is dropped that the kernel refuses, whose program is one
that was tried already, that does not compile, whose results are not those of the default, or that is clearly slower in
its first turn. What looks best is then timed against the default once more, in rounds of its own: the best of many
noisy figures is partly luck. Only what is faster there too is kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from maxstack.bench.measure import Case, Prepared, Program
from maxstack.bench.tune.race import LEAST_GAIN, Effort, Race
from maxstack.bench.tune.results import apart
from maxstack.kernels import tiles

REFUSALS = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)
"""What a compiler raises for blocks that it cannot take."""
LONG_COMPILE = 60.0
"""Seconds, if they are also more than LONGER times the default's: sizes that lie further away are not compiled."""
LONGER = 4.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one request of a case."""

    case: Case
    request: tiles.Request
    tried: int = 0
    """Candidates that were timed."""
    dropped: tuple[str, ...] = ()
    """Candidates that were not, or in one turn only, and why."""
    untried: tuple[str, ...] = ()
    """What the search was ended before."""
    best: tiles.Sizes | None = None
    """None: the default stays."""
    ratio: float = 1.0
    """Time of the default over time of what was best (1: nothing was better)."""
    seconds: float = 0.0
    """That the search took."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "key": self.request.key, "shape": self.case.shape, "tried": self.tried, "dropped": list(self.dropped),
            "untried": list(self.untried), "best": self.best, "ratio": self.ratio, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Now:
    """What is being done."""

    request: tiles.Request
    stage: str
    """"compiling", "timing" or "once more"."""
    sizes: tiles.Sizes
    """Of the candidate, those that are varied; {} for the default."""
    left: int
    """Candidates after this one."""
    best: tiles.Sizes
    """So far, those that are not the default's."""
    ratio: float


def tuned(
    case: Case, *, effort: Effort, done: dict[str, tiles.Sizes], watch: Callable[[Now], None] = lambda now: None
) -> Iterator[Found]:  # fmt: skip
    """Tune what the case's own contender asks for. `done` has the sizes of keys that are tuned already, which hold for
    what follows; this adds to it. KeyboardInterrupt is raised after what it ended, as far as that came."""
    make = next(iter(case.contenders.values()))
    with tiles.asked() as requests, tiles.trying(done):
        make()
    interrupted = False
    for request in [each for each in requests.values() if each.key not in done and each.axes]:
        search = _Search(case, request, make, done, effort, watch)
        interrupted = interrupted or search.interrupted()
        found = search.found()
        done[request.key] = found.best or {}
        yield found
    if interrupted:
        raise KeyboardInterrupt


def outward(values: tuple[int, ...], start: int) -> list[int]:
    """Others than `start`, the nearest first: the larger ones, then the smaller ones."""
    return sorted(v for v in values if v > start) + sorted((v for v in values if v < start), reverse=True)


def different(sizes: tiles.Sizes, default: tiles.Sizes) -> tiles.Sizes:
    """Those that are not the default's."""
    return {name: size for name, size in sizes.items() if size != default[name]}


def words(sizes: tiles.Sizes) -> str:
    """For people."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


class _Dropped(Exception):
    """Why a candidate is none, or no longer one."""


@dataclass
class _Search:
    case: Case
    request: tiles.Request
    make: Callable[[], Prepared]
    done: dict[str, tiles.Sizes]
    effort: Effort
    watch: Callable[[Now], None]
    ratio: float = 1.0
    best_call: Prepared | None = None
    tried: int = 0
    dropped: list[str] = field(default_factory=list)
    programs: dict[str, tiles.Sizes] = field(default_factory=dict)
    """What was tried, by a digest of its program."""
    sure: bool = False
    """Whether the last comparison was made, or there was none to make."""

    def __post_init__(self):
        self.began = self.effort.clock()
        self.best = self.request.current
        self.left = [
            (name, value) for name, values in self.request.axes.items() for value in outward(values, self.best[name])
        ]  # fmt: skip

    def interrupted(self) -> bool:
        """Search; whether KeyboardInterrupt ended it."""
        try:
            self._run()
        except KeyboardInterrupt:
            return True
        return False

    def found(self) -> Found:
        """As far as it came."""
        untried = [f"{name} {value}" for name, value in self.left]
        if self.best_call is not None and not self.sure:
            untried.append(f"once more {self._named(self.best)}, which looked {self.ratio:.2f} times as fast")
        better = self.sure and self.ratio > 1
        return Found(
            case=self.case, request=self.request, tried=self.tried, dropped=tuple(self.dropped),
            untried=tuple(untried), best=self.best if better else None, ratio=self.ratio if better else 1.0,
            seconds=self.effort.clock() - self.began,
        )  # fmt: skip

    def _run(self) -> None:
        if self.effort.spent:
            return
        self._tell("compiling", {})
        with tiles.trying(self.done):
            default = self.make()
        self.usual_compile = self._compiled(default, self.best)
        self.wanted = jax.block_until_ready(default())
        self.race = Race(default, self.effort)
        for name in self.request.axes:
            self._vary(name)
        if self.ratio >= LEAST_GAIN and self.best_call is not None:
            self._tell("once more", self._changed())
            self.ratio = self.race.final(self.best_call)
        else:
            self.ratio = 1.0
        self.sure = True

    def _vary(self, name: str) -> None:
        """Other values of one size, beside what was best before."""
        start, too_long = self.best, set[bool]()
        for value in [each for key, each in self.left if key == name]:
            if self.effort.spent:
                return
            sizes, larger = start | {name: value}, value > start[name]
            try:
                if larger in too_long:
                    raise _Dropped("the one before took too long to compile")
                if self._try(name, sizes) > max(LONG_COMPILE, LONGER * self.usual_compile):
                    too_long.add(larger)
            except _Dropped as reason:
                self.dropped.append(f"{self._named(sizes)}: {reason}")
            self.left.remove((name, value))

    def _try(self, name: str, sizes: tiles.Sizes) -> float:
        """Compile and time a candidate; it is the best if it is. Returns seconds of compilation; raises _Dropped."""
        if (reason := self.request.refused(sizes)) is not None:
            raise _Dropped(reason)
        self._tell("compiling", {name: sizes[name]})
        try:
            with tiles.asked() as asked, tiles.trying(self.done | {self.request.key: sizes}):
                call = self.make()
            if self.request.key not in asked:
                raise _Dropped("the kernel did not ask again; a trace of another call was taken")
            compiling = self._compiled(call, sizes)
            results = jax.block_until_ready(call())
        except REFUSALS as error:
            raise _Dropped(next(iter(str(error).splitlines()), type(error).__name__)) from error
        if (difference := apart(results, self.wanted)) is not None:
            raise _Dropped(f"other results than the default's: {difference}")
        self._tell("timing", {name: sizes[name]})
        ratio, clear = self.race.heat(call, self.ratio)
        if clear is not None:
            raise _Dropped(clear)
        self.tried += 1
        if ratio > self.ratio:
            self.best, self.best_call, self.ratio = sizes, call, ratio
        return compiling

    def _compiled(self, call: Prepared, sizes: tiles.Sizes) -> float:
        """Compile a program that was not tried yet; the seconds it took. Raises _Dropped."""
        if not isinstance(call, Program):
            return 0.0
        self._new(call.traced(), sizes)  # what is the same before it is compiled need not be compiled
        began = self.effort.clock()
        call.compile()
        seconds = self.effort.clock() - began
        self._new(call.compiled(), sizes)
        return seconds

    def _new(self, program: str, sizes: tiles.Sizes) -> None:
        if (same := self.programs.setdefault(program, sizes)) is not sizes:
            raise _Dropped(f"the same program as with {self._named(same)}")

    def _named(self, sizes: tiles.Sizes) -> str:
        return words(different(sizes, self.request.current)) or "the default"

    def _changed(self) -> tiles.Sizes:
        return different(self.best, self.request.current)

    def _tell(self, stage: str, sizes: tiles.Sizes) -> None:
        left = len(self.left) - (stage != "once more" and bool(sizes))
        self.watch(Now(self.request, stage, sizes, left, self._changed(), self.ratio))
