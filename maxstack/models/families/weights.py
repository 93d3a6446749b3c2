"""How the tensors of a file hold the leaves of a model: names, transpositions, splits and fusions, both ways.

A family's table maps a leaf to the tensor that holds it, `"attention.q.w"` to
`"model.layers.{layer}.self_attn.q_proj.weight"` for the leaves of a layer. A matrix lies in the file as PyTorch's
Linear keeps it, [outputs, inputs], flattened to two dimensions; everything else as it is. What lies otherwise is a
`Special`.

A form is one function from the tensor to the leaf's array as a *view* of it, so that reading is
`leaf[...] = view(tensor)` and writing is `view(tensor)[...] = leaf`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.block import BlockConfig
from maxstack.models.transformer import TransformerConfig

Shape = tuple[int, ...]
LAYER_LEAF = re.compile(r"stacks\.(\d+)\.layers\.(\d+)\.(.+)")
# Matrices that are not called "….w"; the experts' are one a layer and expert.
MATRICES = frozenset({"head", "feed_forward.router"})
EXPERTS = frozenset({"feed_forward.gate", "feed_forward.up", "feed_forward.down"})
TWO_INPUT_AXES = frozenset({"attention.o.w"})


class Form(NamedTuple):
    """How a leaf (of one layer, of one expert) lies in a tensor of the file."""

    shape: Shape
    """Shape of the tensor in the file."""
    view: Callable[[np.ndarray], np.ndarray]
    """From the tensor to the leaf, as a numpy view (reshape of what is contiguous, transpose, slices)."""
    split: Shape | None = None
    """The leaf's shape with an axis cut in two, where the view has more axes than the leaf; else None."""
    parts: "tuple[tuple[Any, Form], ...]" = ()
    """Slices of the leaf with their own forms in the same tensor, where no single view holds it; `view` and `split` are
    not looked at then."""

    @property
    def direct(self) -> bool:
        """Whether the view has the leaf's own shape."""
        return self.split is None and not self.parts


class Place(NamedTuple):
    """What a Special form is made from: the layer's config (None outside of layers), the model's, the leaf's shape."""

    block: BlockConfig | None
    model: TransformerConfig
    shape: Shape


class Special(NamedTuple):
    """A tensor that does not lie as PyTorch's Linear keeps it."""

    source: str
    form: Callable[[Place], Form]


Table = Mapping[str, str | Special]


class Entry(NamedTuple):
    """One leaf, or one layer's or expert's part of it, and where it lies in the file."""

    leaf: str
    index: tuple[int, ...]
    source: str
    form: Form


def matrix(place: Place, inputs: int = 1) -> Form:
    """[outputs, inputs] in the file, [inputs, outputs] in the model; either side may have several axes there."""
    ins, outs = place.shape[:inputs], place.shape[inputs:]
    order = (*range(len(outs), len(outs) + len(ins)), *range(len(outs)))
    return Form((math.prod(outs), math.prod(ins)), lambda a: a.reshape(*outs, *ins).transpose(order))


def as_it_is(place: Place) -> Form:
    """Flattened in the file: norms, biases of heads, tables."""
    flat = place.shape if len(place.shape) != 2 or place.block is None else (math.prod(place.shape),)
    return Form(flat, lambda a: a.reshape(place.shape))


def whole(place: Place) -> Form:
    """The same shape in the file."""
    return Form(place.shape, lambda a: a)


def untransposed(place: Place, inputs: int = 1) -> Form:
    """[inputs, outputs] in the file too, either side flattened (the Conv1D of GPT-2)."""
    ins, outs = place.shape[:inputs], place.shape[inputs:]
    return Form((math.prod(ins), math.prod(outs)), lambda a: a.reshape(place.shape))


def rows(start: int, size: int, total: int, form: Callable[[Place], Form]) -> Callable[[Place], Form]:
    """`form` in the rows [start, start + size) of a fused tensor of `total` rows."""

    def fused(place: Place) -> Form:
        inner = form(place)
        if inner.shape[0] != size:
            raise ValueError(f"rows: {size} rows are given to a leaf of {inner.shape[0]}")
        return part_of(inner, (total, *inner.shape[1:]), slice(start, start + size))

    return fused


def columns(start: int, size: int, total: int, form: Callable[[Place], Form]) -> Callable[[Place], Form]:
    """`form` in the last axis' [start, start + size) of a fused tensor that has `total` there."""

    def fused(place: Place) -> Form:
        inner = form(place)
        if inner.shape[-1] != size:
            raise ValueError(f"columns: {size} columns are given to a leaf of {inner.shape[-1]}")
        return part_of(inner, (*inner.shape[:-1], total), np.s_[..., start : start + size])

    return fused


def part_of(inner: Form, shape: Shape, at: Any) -> Form:
    """`inner` in a part of a tensor of `shape`: what is at the index `at` of it."""
    parts = tuple((index, part_of(part, shape, at)) for index, part in inner.parts)
    return Form(shape, lambda a: inner.view(a[at]), inner.split, parts)


def interleaved(place: Place) -> Form:
    """A query or key matrix (or bias) whose rotated pairs are neighbours in the file, half the rotated part apart here.

    Where only the start of each head is rotated, its other dimensions lie in the file as they do here.
    """
    *ins, n, h = place.shape
    rotated = rotated_size(place)
    order = (3, 0, 2, 1) if ins else (0, 2, 1)
    shape, split = (n * h, *ins), (*ins, n, 2, rotated // 2)

    def pairs(a: np.ndarray) -> np.ndarray:
        return a.reshape(n, h, *ins)[:, :rotated].reshape(n, rotated // 2, 2, *ins).transpose(order)

    def others(a: np.ndarray) -> np.ndarray:
        rest = a.reshape(n, h, *ins)[:, rotated:]
        return rest.transpose(2, 0, 1) if ins else rest

    if rotated == h:
        return Form(shape, pairs, split)
    parts = ((np.s_[..., :rotated], Form(shape, pairs, split)), (np.s_[..., rotated:], Form(shape, others)))
    return Form(shape, others, parts=parts)


def rotated_size(place: Place) -> int:
    """How many dimensions of a query or key head are rotated: all, where the layer does not say."""
    rope = getattr(place.block.attention, "rope", None) if place.block is not None else None
    head_size = getattr(place.block.attention, "head_size", None) if place.block is not None else None
    return place.shape[-1] if rope is None or head_size is None else rope.rotated(head_size)


def standard(leaf: str, place: Place) -> Form:
    """The form of a leaf whose table entry is only a name."""
    if leaf in EXPERTS:
        return matrix(Place(place.block, place.model, place.shape[-2:]))
    if leaf in MATRICES or leaf.endswith(".w"):
        return matrix(place, 2 if leaf in TWO_INPUT_AXES else 1)
    return as_it_is(place)


def entries(config: TransformerConfig, table: Table, absent: Sequence[str] = ()) -> list[Entry]:
    """Every part of every leaf of the model, with its place in the file. `absent` leaves lie in no tensor.

    Raises UserError when the table has no place for a leaf: the family cannot hold such a model.
    """
    # Only shapes are looked at, and loading asks for these first and then for those of its own compute type.
    abstract = tree.abstract_model(dataclasses.replace(config, dtype="float32", remat="none"))
    found: list[Entry] = []
    for leaf, array in tree.leaves(abstract).items():
        match = LAYER_LEAF.fullmatch(leaf)
        name = match.group(3) if match else leaf
        if name in absent:
            continue
        if name not in table:
            raise UserError(f"this family of models has no place for the weight {leaf}")
        if match is None:
            found.append(_entry(leaf, (), table[name], Place(None, config, array.shape), name, {}))
            continue
        stack_index, place_in_pattern = int(match.group(1)), int(match.group(2))
        before = sum(len(s.pattern) * s.repeats for s in config.stacks[:stack_index])
        stack = config.stacks[stack_index]
        place = Place(stack.pattern[place_in_pattern], config, array.shape[1:])
        for repeat in range(stack.repeats):
            layer = before + repeat * len(stack.pattern) + place_in_pattern
            found += _of_layer(leaf, repeat, layer, table[name], place, name)
    return found


def _of_layer(
    leaf: str, repeat: int, layer: int, where: str | Special, place: Place, name: str
) -> list[Entry]:
    source = where if isinstance(where, str) else where.source
    if "{expert}" not in source:
        return [_entry(leaf, (repeat,), where, place, name, {"layer": layer})]
    one = Place(place.block, place.model, place.shape[1:])
    return [
        _entry(leaf, (repeat, expert), where, one, name, {"layer": layer, "expert": expert})
        for expert in range(place.shape[0])
    ]


def _entry(
    leaf: str, index: tuple[int, ...], where: str | Special, place: Place, name: str, numbers: dict[str, int]
) -> Entry:
    if isinstance(where, str):
        return Entry(leaf, index, where.format(**numbers), standard(name, place))
    return Entry(leaf, index, where.source.format(**numbers), where.form(place))


def pieces(form: Form, leaf: np.ndarray, tensor: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of views, of the leaf and of the tensor, that hold the same numbers; together they are all of the leaf."""
    if form.parts:
        for index, part in form.parts:
            yield from pieces(part, leaf[index], tensor)
    else:
        yield (leaf if form.split is None else leaf.reshape(form.split)), form.view(tensor)


def read_into(target: np.ndarray, form: Form, tensor: np.ndarray) -> None:
    """Fill `target`, a leaf's array or the part of one layer, from a tensor of the file; casts to target's type."""
    for leaf, view in pieces(form, target, tensor):
        leaf[...] = view


def write_from(tensor: np.ndarray, form: Form, leaf: np.ndarray) -> None:
    """Fill the leaf's part of a tensor of the file; casts to the tensor's type."""
    for part, view in pieces(form, leaf, tensor):
        view[...] = part
