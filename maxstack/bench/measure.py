"""Contenders for the same work, timed in turns."""

import dataclasses
import hashlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxstack.kernels import Unsupported

Prepared = Callable[[], Any]
"""A call with its arguments in place; what it returns is waited for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape, and who can do the work."""

    kernel: str
    shape: str
    """For people: "8 × 2,048 tokens, 32/8 heads of 128"."""
    contenders: dict[str, Callable[[], Prepared]]
    """By name, ours first; made when its turn comes. May raise Unsupported."""
    flops: float = 0.0
    """Multiplications and additions that the work needs; 0 where memory is what counts."""
    bytes: float = 0.0
    """Bytes that the work has to move; 0 where products are what counts."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How long each contender took for a case."""

    case: Case
    seconds: dict[str, float]
    """Median of the rounds; without those that declined."""
    declined: dict[str, str]
    """Why the others did not take part."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "kernel": self.case.kernel, "shape": self.case.shape, "flops": self.case.flops, "bytes": self.case.bytes,
            "seconds": self.seconds, "declined": self.declined,
        }  # fmt: skip


def measured(case: Case, *, rounds: int, least_seconds: float = 0.0) -> Result:
    """Run a case's contenders in turns. A round repeats a call until it has taken `least_seconds`."""
    ready: dict[str, Prepared] = {}
    declined: dict[str, str] = {}
    for name, make in case.contenders.items():
        try:
            call = make()
            if isinstance(call, Program):
                call.compile()
            ready[name] = call
        except (Unsupported, NotImplementedError) as reason:
            declined[name] = str(reason)
    took = times(ready, rounds=rounds, least_seconds=least_seconds)
    return Result(case, {name: statistics.median(each) for name, each in took.items()}, declined)


def times(calls: dict[str, Prepared], *, rounds: int, least_seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call in each round, in turns. A round repeats a call until it has taken `least_seconds`."""
    repeats = {name: max(1, round(least_seconds / max(once(call), 1e-9))) for name, call in calls.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            # Only the last is waited for: the host runs ahead of the device, as it does in a program.
            jax.block_until_ready([call() for _ in range(repeats[name])][-1])
            took[name].append((time.perf_counter() - start) / repeats[name])
    return took


def once(call: Prepared) -> float:
    """Seconds of the second call, the first being a warm-up."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Program:
    """A function traced for its arguments, and compiled when it is first called or asked to be. Called with nothing."""

    def __init__(self, function: Callable, *arguments: Any):
        # A function made anew: of the same one jax has kept a trace, which may be of other sizes of blocks.
        self._lowered = jax.jit(lambda *each: function(*each)).lower(*arguments)
        self._arguments = arguments
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self) -> Any:
        return self.compile()(*self._arguments)

    def traced(self) -> str:
        """A digest of what is to be compiled."""
        return _digest(self._lowered.as_text())

    def compiled(self) -> str:
        """A digest of what was compiled, without the lines of source that it came from."""
        return _digest(re.sub(r"metadata=\{[^}]*\}", "", self.compile().as_text() or ""))

    def compile(self) -> jax.stages.Compiled:
        """Compiled once."""
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepared(function: Callable, *arguments: Any) -> Program:
    """`function` for these arguments."""
    return Program(function, *arguments)


def bandwidth(megabytes: int = 256) -> float:
    """Bytes a second at which a sum reads a large array, the best of five: what memory gives here."""
    array = jnp.ones((megabytes, 1 << 18), jnp.float32)
    call = prepared(lambda x: jnp.sum(x, axis=1), array)
    return array.nbytes / min(once(call) for _ in range(5))


def product_rate(size: int = 2048, dtype: Any = jnp.float32) -> float:
    """FLOPs a second of a large square product, the best of three: what the arithmetic units give here."""
    a = jnp.ones((size, size), dtype)
    call = prepared(lambda a: a @ a, a)
    return 2 * size**3 / min(once(call) for _ in range(3))


def table(results: Sequence[Result], memory: float, products: float) -> str:
    """A markdown table: ratios to ours, and ours as a share of what the machine was seen to give."""
    lines = ["| kernel | shape | took | others / ours | share |", "|---|---|---|---|---|"]
    for result in results:
        ours, *others = result.case.contenders
        if ours not in result.seconds:
            lines.append(
                f"| {result.case.kernel} | {result.case.shape} | not measured: {result.declined[ours]} | | |"
            )
            continue
        seconds = result.seconds[ours]
        ratios = [
            f"{name} {result.seconds[name] / seconds:.2f}"
            if name in result.seconds
            else f"{name}: not measured"
            for name in others
        ]
        lines.append(
            f"| {result.case.kernel} | {result.case.shape} | {ours} | {', '.join(ratios)} | "
            f"{share(result.case, seconds, memory, products)} |"
        )
    return "\n".join(lines)


def share(case: Case, seconds: float, memory: float, products: float) -> str:
    """Of the bandwidth or of the rate of products, whichever the work comes nearer to."""
    of_memory, of_products = case.bytes / seconds / memory, case.flops / seconds / products
    if max(of_memory, of_products) == 0:
        return ""
    return f"{of_memory:.0%} of bandwidth" if of_memory > of_products else f"{of_products:.0%} of products"
