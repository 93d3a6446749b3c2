"""The text of a program compiled for a TPU, as instructions: what each takes, gives, and where arrays lie.

XLA writes an array's place and tiling into its type: `bf16[64,4096]{1,0:T(8,128)(2,1)S(1)}` lies on the chip (`S(1)`),
without `S(…)` it lies in HBM. In HBM whole tiles are there, so sizes are those of whole tiles.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


class Array(NamedTuple):
    """An array's type."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """Dimensions, the one that is contiguous first."""
    tile: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Of whole tiles."""
        return self.part(self.shape)

    def part(self, shape: tuple[int, ...]) -> int:
        """Bytes of the tiles that a part of this shape lies in, at the least."""
        sizes = dict(zip(self.order, reversed(self.tile), strict=False))
        whole = math.prod(-(-size // sizes.get(d, 1)) * sizes.get(d, 1) for d, size in enumerate(shape))
        return whole * bits(self.dtype) // 8

    def aligned(self, shape: tuple[int, ...]) -> bool:
        """Whether a part of this shape has whole tiles."""
        return self.part(shape) == math.prod(shape) * bits(self.dtype) // 8


@dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    """Of the result, those of tuples one after the other."""
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    line: str
    root: bool


Computations = dict[str, dict[str, Instruction]]


def bits(dtype: str) -> int:
    """Of one number."""
    return BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type."""
    found = []
    for dtype, dims, order, rest in _ARRAY.findall(text):
        shape = tuple(int(d) for d in dims.split(",") if d)
        tile = re.match(r"T\(([\d,]*)\)", rest)
        minor = tuple(int(d) for d in order.split(",") if d) or tuple(reversed(range(len(shape))))
        sizes = tuple(int(t) for t in tile[1].split(",")) if tile else ()
        found.append(Array(dtype, shape, minor, sizes, not re.search(r"S\([1-9]", rest)))
    return tuple(found)


def computations(text: str) -> Computations:
    """Every computation's instructions by name; the entry is "ENTRY"."""
    found: Computations = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault("ENTRY" if head[1] else head[2], {})
        elif (one := instruction(line)) is not None:
            current[one.name] = one
    return found


def instruction(line: str) -> Instruction | None:
    """What a line says; None for one that is no instruction."""
    match = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if match is None:
        return None
    kind, rest = _type(match[3])
    opened = re.match(r"\s*([\w\-]+)\(", rest)
    if opened is None:
        return None
    inside, after = _bracketed(rest[opened.end() - 1 :])
    called = {
        key: tuple(re.findall(r"[\w.\-]+", names))
        for key, names in _CALLED.findall(after.partition("metadata=")[0])
    }
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], opened[1], arrays(kind), operands, called, line, bool(match[1]))


def _type(text: str) -> tuple[str, str]:
    """(type, the rest of the line)."""
    if text.startswith("("):
        inside, rest = _bracketed(text)
        return inside, rest
    kind, _, rest = text.partition(" ")
    return kind, rest


def _bracketed(text: str) -> tuple[str, str]:
    """What is inside the first bracket, and what comes after it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:at], text[at + 1 :]
    return text[1:], ""
