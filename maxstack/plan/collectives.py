"""The collectives of a compiled program, read from its text: what travels, how often, and between how many chips.

The text is XLA's own (`compiled.as_text()`). An instruction in the body of a `while` counts as often as the loop
runs, which its condition says. On TPU a reduce-scatter is written as an all-reduce in a fused computation whose name
says so, and a collective that runs beside other work appears in several computations under one channel.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4, "c64": 64}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations|branch_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    """One of KINDS."""
    shapes: tuple[str, ...]
    """Arrays on their larger side (gathered, or not yet scattered), such as "bf16[4096,14336]"."""
    bytes: int
    """Of these arrays on one chip."""
    group: int
    """Chips that take part together."""
    times: int
    """How often it runs in a step."""
    in_loop: bool
    """It stands in the body of a loop, such as that over layers."""
    source: str
    """The operation of the program it comes from."""

    @property
    def wire_bytes(self) -> float:
        """Bytes a chip sends in a step: a ring's, which is the least there is."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


def collectives(text: str) -> list[Collective]:
    """Every collective of the program once, largest traffic first."""
    bodies = _computations(text)
    times = _times(bodies)
    looped = _looped(bodies)
    found: dict[tuple, Collective] = {}
    for name, lines in bodies.items():
        if name not in times:
            continue
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            one = _collective(line, match, name, times[name], name in looped)
            channel = re.search(r"channel_id=(\d+)", line)
            scattered = name if one.kind != match["kind"] else ""
            found[(one.kind, channel and channel[1], one.shapes, one.source, scattered)] = one
    return sorted(found.values(), key=lambda one: -one.wire_bytes)


def _collective(line: str, match: re.Match[str], computation: str, times: int, in_loop: bool) -> Collective:
    kind = match["kind"]
    shapes = _SHAPE.findall(match["result"])
    if f"{kind}-start(" in line and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :]  # an asynchronous one returns its operands before its results
    group = _group(line)
    scale = group if kind == "reduce-scatter" else 1
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        shapes=tuple(f"{dtype}[{dims}]" for dtype, dims in shapes),
        bytes=scale * sum(_bytes(dtype, dims) for dtype, dims in shapes),
        group=group,
        times=times,
        in_loop=in_loop,
        source=source[1] if source else computation,
    )


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype[1:3]) or 8)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def _group(line: str) -> int:
    """Chips of a replica group, in any of the three spellings."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'", named[2] or "") or list(sizes)
        return math.prod(sizes[axis] for axis in axes)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    return 2 if "source_target_pairs" in line else 1


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the entry's name is "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else match[1], [])
        else:
            current.append(line)
    return bodies


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in a step; one that is called from several places counts the most frequent."""
    times: dict[str, int] = {}
    ahead = [("ENTRY", 1)]
    while ahead:
        name, count = ahead.pop()
        if name not in bodies or times.get(name, 0) >= count:
            continue
        times[name] = count
        for line in bodies[name]:
            loop = _WHILE.search(line)
            trips = _trips(bodies.get(loop[1], [])) if loop else 1
            ahead += [(called, count * trips) for called in _called(line)]
    return times


def _looped(bodies: Mapping[str, list[str]]) -> set[str]:
    """Computations that run inside a loop."""
    ahead = [loop[2] for lines in bodies.values() for line in lines if (loop := _WHILE.search(line))]
    looped: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name in bodies and name not in looped:
            looped.add(name)
            ahead += [called for line in bodies[name] for called in _called(line)]
    return looped


def _trips(condition: Iterable[str]) -> int:
    """Rounds of a loop that counts up from 0 to a constant, as a scan's does; 1 when the bound is no constant."""
    bounds = [int(found[1]) for line in condition if (found := re.search(r" constant\((\d+)\)", line))]
    return max(bounds, default=1)


def _called(line: str) -> list[str]:
    return [name for group in _CALLED.findall(line) for name in re.findall(r"[\w.\-]+", group)]
