"""What a plan will hold, while it is made, and the choice of its shapes from the closed tables."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from maxstack.serve.plan import Shape, places
from maxstack.serve.sequence import Sequence


@dataclass
class Batch:
    """Sequences in the order in which they were taken: those that decode with the tokens they may gain, those that
    read with the tokens of their chunk."""

    decodes: dict[Sequence, int] = field(default_factory=dict)
    chunks: dict[Sequence, int] = field(default_factory=dict)


def best_shape(shapes: tuple[Shape, ...], wanted: list[int], budget: int, fixed: int) -> Shape:
    """The shape that reads most tokens for its cost, of those that fit the budget.

    `wanted` are the tokens that each sequence still has to read, the first in order first. The cost of a step is
    counted in tokens: those of the shape, padding included, and `fixed`, what it costs anyhow.
    """
    best, best_rate = None, -1.0
    for shape in shapes:
        if places(shape) > budget:
            continue
        rate = sum(dealt(shape, wanted)) / (places(shape) + fixed)
        if rate > best_rate:
            best, best_rate = shape, rate
    if best is None:
        raise ValueError(f"no shape of {shapes} has room in a budget of {budget} tokens")
    return best


def dealt(shape: Shape, wanted: Iterable[int]) -> Iterator[int]:
    """The tokens that a chunk of this shape has for each sequence, the first in order first, of those it `wanted`."""
    left = places(shape)
    for count in islice(wanted, shape[0]):
        own = min(count, shape[1], left)
        left -= own
        yield own


def fitting_shape(shapes: tuple[Shape, ...], counts: list[int]) -> Shape:
    """The smallest shape that holds chunks of so many tokens."""
    fits = [
        shape
        for shape in shapes
        if shape[0] >= len(counts) and shape[1] >= max(counts) and places(shape) >= sum(counts)
    ]
    return min(fits, key=lambda shape: (places(shape), shape))


def steps_for(steps: tuple[int, ...], longest: int) -> Iterator[int]:
    """Numbers of steps to try, the best first, when the row that goes on for longest has `longest` to go."""
    for i in range(len(steps) - 1, -1, -1):
        if i == 0 or steps[i - 1] < longest:
            yield steps[i]
