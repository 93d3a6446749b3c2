"""`maxstack bench kernels --tune`: sizes of blocks tried on the machine at hand, the best kept in the user's table.

A case's own contender is traced once to see what its kernels ask for (`kernels/tiles.py`). For each that has sizes
worth trying, one size after another is varied; a candidate whose results are not those of the default is dropped, as
is one that does not compile. What looks best is then timed against the default once more, in rounds of its own: the
best of many noisy figures is partly luck. Only what is faster there too is kept.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxstack.bench.measure import Case, Prepared, times
from maxstack.config import UserError, write_atomically
from maxstack.kernels import tiles

LEAST_GAIN = 1.03
"""Of the median ratio; less is not worth a line."""
SURE = 0.8
"""Share of the rounds of the last comparison that a candidate has to win."""
CLOSE = {2: 2.0**-5, 4: 2.0**-12, 8: 2.0**-40}
"""Largest difference of two results by the bytes of their numbers, as a share of the largest number: sums in another
order, and weights rounded on the way, differ by a few times the rounding."""
REFUSALS = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)
"""What a compiler raises for blocks that it cannot take."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What came out for one request of a case."""

    case: Case
    request: tiles.Request
    tried: int
    """Candidates that were timed."""
    dropped: tuple[str, ...]
    """Candidates that were not, and why."""
    best: tiles.Sizes | None
    """None: the default stays."""
    ratio: float
    """Time of the default over time of what was best (1: nothing was better)."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "key": self.request.key, "shape": self.case.shape, "tried": self.tried, "dropped": list(self.dropped),
            "best": self.best, "ratio": self.ratio,
        }  # fmt: skip


def tuned(case: Case, *, rounds: int, least_seconds: float, done: dict[str, tiles.Sizes]) -> Iterator[Found]:
    """Tune what the case's own contender asks for. `done` has the sizes of keys that are tuned already, which hold for
    what follows; this adds to it."""
    make = next(iter(case.contenders.values()))
    with tiles.asked() as requests, tiles.trying(done):
        default = make()
    for request in [each for each in requests.values() if each.key not in done and each.axes]:
        found = _tuned(case, request, make, default, rounds, least_seconds, done)
        done[request.key] = found.best or {}
        yield found
        with tiles.trying(done):
            default = make()


def _tuned(
    case: Case, request: tiles.Request, make: Callable[[], Prepared], default: Prepared, rounds: int,
    least_seconds: float, done: dict[str, tiles.Sizes],
) -> Found:  # fmt: skip
    wanted = jax.block_until_ready(default())
    best, best_call, best_ratio = request.current, default, 1.0
    tried, dropped = 0, []
    for name, values in request.axes.items():
        start = best
        for value in values:
            sizes = start | {name: value}
            if sizes == start:
                continue
            with tiles.asked() as again, tiles.trying(done | {request.key: sizes}):
                call, why = _candidate(request, sizes, make, wanted, again)
            if call is None:
                dropped.append(f"{sizes}: {why}")
                continue
            tried += 1
            ratio = statistics.median(_ratios(default, call, max(rounds // 2, 1), least_seconds))
            if ratio > best_ratio:
                best, best_call, best_ratio = sizes, call, ratio
    if best_ratio >= LEAST_GAIN:
        ratios = _ratios(default, best_call, 2 * rounds, least_seconds)
        best_ratio = statistics.median(ratios)
        if best_ratio >= LEAST_GAIN and sum(ratio > 1 for ratio in ratios) >= SURE * len(ratios):
            return Found(case, request, tried, tuple(dropped), best, best_ratio)
    return Found(case, request, tried, tuple(dropped), None, 1.0)


def _candidate(
    request: tiles.Request, sizes: tiles.Sizes, make: Callable[[], Prepared], wanted: Any, asked: dict
) -> tuple[Prepared | None, str]:
    """A compiled call with these sizes, or why there is none."""
    if (reason := request.refused(sizes)) is not None:
        return None, reason
    try:
        call = make()
        results = jax.block_until_ready(call())
    except REFUSALS as error:
        return None, next(iter(str(error).splitlines()), type(error).__name__)
    if request.key not in asked:
        return None, "the kernel did not ask again; a trace of another call was taken"
    if (difference := apart(results, wanted)) is not None:
        return None, f"other results than the default's: {difference}"
    return call, ""


def _ratios(default: Prepared, call: Prepared, rounds: int, least_seconds: float) -> list[float]:
    """Time of the default over time of the other, of each round."""
    took = times({"default": default, "other": call}, rounds=rounds, least_seconds=least_seconds)
    return [one / other for one, other in zip(took["default"], took["other"], strict=True)]


def apart(results: Any, wanted: Any) -> str | None:
    """Where results differ by more than rounding; None: nowhere."""
    for result, meant in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        same, difference, largest = map(float, _compared(result, meant))
        if not same:
            return "not finite in other places"
        close = CLOSE.get(jnp.dtype(meant.dtype).itemsize, 0.0) * largest
        if difference > close:
            return f"by {difference:.2g} of {largest:.2g}"
    return None


@jax.jit
def _compared(result: jax.Array, meant: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    finite = jnp.isfinite(meant)
    same = jnp.all(
        jnp.where(finite, jnp.isfinite(result), (result == meant) | (jnp.isnan(result) & jnp.isnan(meant)))
    )
    wide = jnp.promote_types(meant.dtype, jnp.float32)
    result, meant = (jnp.where(finite, x.astype(wide), 0) for x in (result, meant))
    return same, jnp.max(jnp.abs(result - meant), initial=0), jnp.max(jnp.abs(meant), initial=0)


def keep(found: list[Found], file: Path | None) -> str:
    """Write what is better to the user's table; keys whose default is the best lose their line. Says what was done.

    Raises UserError where there is no table to write, or a file that is none.
    """
    if file is None:
        raise UserError(
            f"{tiles.SWITCH} is empty, so there is no table to fill; name a file with it, or unset it"
        )
    try:
        lines = tiles.read(file)
    except FileNotFoundError:
        lines = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}; move it away, or name another with {tiles.SWITCH}") from error
    for each in found:
        lines.pop(each.request.key, None)
        if each.best is not None:
            source = f"{each.ratio:.2f} times as fast as the default, jax {jax.__version__}"
            lines[each.request.key] = {"sizes": each.best, "source": source}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, tiles.written(lines).encode())
    tiles.forget()
    better = sum(each.best is not None for each in found)
    return f"{better} of {len(found)} are faster than the default; {file} has {len(lines)} lines"


def table(found: list[Found]) -> str:
    """Markdown."""
    lines = ["| for | default | best | default / best | tried | dropped |", "|---|---|---|---|---|---|"]
    for each in found:
        default = _words(each.request.current)
        best = "the default" if each.best is None else _words(each.best)
        lines.append(
            f"| {each.request.key} | {default} | {best} | {each.ratio:.2f} | {each.tried} | {len(each.dropped)} |"
        )
    return "\n".join(lines)


def _words(sizes: tiles.Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
