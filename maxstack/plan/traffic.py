"""The bytes that a program compiled for a TPU moves between HBM and the chip, counted over its instructions.

Each instruction reads its operands that lie in HBM and writes its results that do. What is only sliced is read where it
is sliced, what is updated in place is written where it is updated, in whole tiles; a part that fills no tiles is read
first. A loop's body counts as often as it runs, of a conditional the branch that is named. What a kernel of ours reads
of an array in HBM the caller says: the compiler does not know it.

XLA's own count, `cost_analysis()["bytes accessed"]`, is not used: it has a loop's body once, all of a pool that is
written in place, and what moves between the memories inside the chip.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from maxstack.plan.hlo import Array, Computations, Instruction, computations

FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "copy-done",
    "slice-done", "async-done", "async-update", "call-start", "call-done", "after-all", "partition-id", "iota",
    "all-reduce-done", "all-gather-done", "collective-permute-done", "opt-barrier", "rng-get-and-update-state",
}  # fmt: skip
"""Instructions that move nothing themselves."""
SAME = ("bitcast", "copy", "convert", "transpose", "reshape")
"""Inside of a fusion: nothing is made in memory, the operand is only seen in another way."""
SLICES = ("dynamic-slice", "slice", "gather")
KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')

Kernels = Callable[[str, list[Array | None], tuple[Array, ...]], int | None]
"""(name, operands, results) -> bytes of a call of a kernel; an operand on the chip is None. None: not known."""


class Moved(NamedTuple):
    """One instruction's traffic in a run of the program."""

    name: str
    op: str
    bytes: int
    """In all of its runs."""
    times: int
    source: str
    """The operation of the program it comes from."""


def traffic(text: str, kernels: Kernels, *, branch: int = 0) -> list[Moved]:
    """What moves, most first. `branch` of each conditional is taken, the last one where there are fewer."""
    whole = computations(text)
    found = [moved for moved in _walk(whole, "ENTRY", 1, kernels, branch) if moved.bytes]
    return sorted(found, key=lambda moved: -moved.bytes)


def _walk(whole: Computations, name: str, times: int, kernels: Kernels, branch: int) -> Iterator[Moved]:
    body = whole.get(name, {})
    for one in body.values():
        if one.op == "while":
            trips = _trips(whole, one.called["condition"][0])
            yield from _walk(whole, one.called["body"][0], times * trips, kernels, branch)
        elif one.op == "conditional":
            branches = one.called["branch_computations"]
            yield from _walk(whole, branches[min(branch, len(branches) - 1)], times, kernels, branch)
        elif one.op == "call":
            yield from _walk(whole, one.called["to_apply"][0], times, kernels, branch)
        elif one.op not in FREE:
            source = re.search(r'op_name="([^"]*)"', one.line)
            each = _bytes(whole, body, one, kernels)
            yield Moved(one.name, one.op, each * times, times, source[1] if source else "")


def _trips(whole: Computations, condition: str) -> int:
    """Rounds of a loop that counts up from 0 to a constant, as a scan's does; 1 when the bound is no constant."""
    lines = [one.line for one in whole.get(condition, {}).values()]
    bounds = [int(found[1]) for line in lines if (found := re.search(r" constant\((\d+)\)", line))]
    return max(bounds, default=1)


def _bytes(whole: Computations, body: dict[str, Instruction], one: Instruction, kernels: Kernels) -> int:
    """Of one run."""
    given = [_result(body, name) for name in one.operands]
    if KERNEL.search(one.line):
        known = kernels(one.name, [a if a is not None and a.in_hbm else None for a in given], one.arrays)
        if known is not None:
            return known
    if one.op == "custom-call" and not KERNEL.search(one.line):
        return 0  # of the compiler's own, such as ConcatBitcast
    if one.op in ("copy-start", "async-start", "slice-start", "call-update"):
        return _started(one, given)
    if one.op == "fusion":
        inner = whole[one.called["calls"][0]]
        read = sum(_read(whole, inner, i, a) for i, a in enumerate(given) if a is not None and a.in_hbm)
        return read + _written(inner, one)
    if one.op in SLICES:
        read = given[0].part(one.arrays[0].shape) if given[0] is not None and given[0].in_hbm else 0
        return read + sum(a.bytes for a in one.arrays if a.in_hbm)
    if one.op == "dynamic-update-slice":
        return _updated(one.arrays[0], given[1])
    read = sum(a.bytes for a in given if a is not None and a.in_hbm)
    return read + sum(a.bytes for a in one.arrays if a.in_hbm)


def _result(body: dict[str, Instruction], name: str) -> Array | None:
    """The array of that name; None for tuples."""
    one = body.get(name)
    return one.arrays[0] if one is not None and len(one.arrays) == 1 else None


def _started(one: Instruction, given: list[Array | None]) -> int:
    """A copy that runs beside other work: (result, operand, …) or ((operands), result, …)."""
    if one.op == "call-update":
        return 2 * sum(a.bytes for a in given[2:] if a is not None)  # a scatter in place
    result = one.arrays[1] if one.op == "slice-start" else one.arrays[0]
    from_hbm = given[0] is not None and given[0].in_hbm
    read = given[0].part(result.shape) if from_hbm and given[0] is not None else 0
    return read + (result.bytes if result.in_hbm else 0)


def _read(whole: Computations, inner: dict[str, Instruction], index: int, array: Array) -> int:
    """Bytes that a fusion reads of one operand: what it slices, or all of it."""
    total, passed_on = _used(whole, inner, _parameter(inner, index), array)
    return array.bytes if passed_on else min(total, array.bytes)


def _parameter(inner: dict[str, Instruction], index: int) -> Instruction:
    return next(one for one in inner.values() if one.op == "parameter" and f"parameter({index})" in one.line)


def _used(
    whole: Computations, inner: dict[str, Instruction], value: Instruction, array: Array
) -> tuple[int, bool]:
    """(bytes that are read of what is `array` outside, whether all of it is a result)."""
    total, passed_on = 0, value.root
    for user in inner.values():
        if value.name not in user.operands:
            continue
        onwards = user.op in SAME
        if user.op in SLICES and user.operands[0] == value.name:
            total += _shaped(value.arrays[0], array).part(user.arrays[0].shape)
        elif user.op == "fusion":
            within = whole[user.called["calls"][0]]
            for i in (i for i, operand in enumerate(user.operands) if operand == value.name):
                read, result = _used(whole, within, _parameter(within, i), array)
                total, onwards = total + read, onwards or result
        elif not onwards and not (user.op == "dynamic-update-slice" and user.operands[0] == value.name):
            total += array.bytes  # an update in place is counted where it is written
        if onwards:
            read, result = _used(whole, inner, user, array)
            total, passed_on = total + read, passed_on or result
    return total, passed_on


def _shaped(array: Array, like: Array) -> Array:
    """An array inside of a fusion, tiled as what it comes from if it has no tiles itself."""
    return array if array.tile or len(array.shape) != len(like.shape) else like


def _written(inner: dict[str, Instruction], one: Instruction) -> int:
    """Bytes that a fusion writes."""
    root = next(line for line in inner.values() if line.root)
    parts = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0
    for part, array in zip(parts, one.arrays, strict=False):
        while part.op == "bitcast" and part.operands[0] in inner:
            part = inner[part.operands[0]]
        if not array.in_hbm:
            continue
        if part.op == "dynamic-update-slice":
            total += _updated(part.arrays[0], _result(inner, part.operands[1]))
        else:
            total += array.bytes
    return total


def _updated(array: Array, update: Array | None) -> int:
    """Bytes of an update in place: tiles that it fills are written, others are read too."""
    if not array.in_hbm or update is None:
        return 0
    return array.part(update.shape) * (1 if array.aligned(update.shape) else 2)
