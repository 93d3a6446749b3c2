"""Room for adapters beside a model's weights, as each form of the programs keeps them.

Beside stacked layers the room is stacked too, [repeats, adapters, …], by stack and by layer of its pattern; beside
layers written out it is a list, one a layer.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from maxstack.config import UserError
from maxstack.models.adapters import (
    Adapter,
    AdapterSlots,
    Factors,
    adaptable,
    attached,
    empty_factors,
    padded,
)
from maxstack.models.generation.weights import Unstacked, with_parts
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.sharding import mesh_of

Room = list[dict[str, Factors]]
"""By layer, or by layer of each stack's pattern."""


class Spot(NamedTuple):
    """What one part of a room is beside."""

    stack: int
    place: int
    repeats: tuple[int, ...]
    """The layers of the stack that it is for: all of them where they are stacked."""


def spots(config: TransformerConfig, *, stacked: bool) -> list[Spot]:
    """Of each part of a room, in order."""
    found = []
    for i, stack in enumerate(config.stacks):
        turns = [tuple(range(stack.repeats))] if stacked else [(turn,) for turn in range(stack.repeats)]
        found += [Spot(i, j, turn) for turn in turns for j in range(len(stack.pattern))]
    return found


def layers_of(model: Transformer) -> list[Any]:
    """The stacked layers of a model, in the order of `spots`."""
    return [layer for stack in model.stacks for layer in cast(Any, stack).layers]


def names(model: Transformer, slots: AdapterSlots | None) -> dict[tuple[int, int], list[str]]:
    """By stack and place in its pattern: the linear maps that adapters may change. Raises UserError for a target that
    no layer has."""
    if slots is None:
        return {}
    found: dict[tuple[int, int], list[str]] = {}
    every = set()
    for spot, layer in zip(spots(model.config, stacked=True), layers_of(model), strict=True):
        own = [name for name, _ in adaptable(layer)]
        every |= set(own)
        found[spot.stack, spot.place] = [n for n in own if slots.targets is None or n in slots.targets]
    if slots.targets is not None and (strange := sorted(set(slots.targets) - every)):
        raise UserError(
            f"adapters: no linear map {strange[0]!r} in the layers: there are {', '.join(sorted(every))}"
        )
    return found


def beside_stacks(model: Transformer, slots: AdapterSlots) -> Room:
    """Room for the scan, on the mesh that the model lies on."""
    dtype, mesh = jnp.dtype(model.config.dtype), mesh_of(model)
    found = zip(spots(model.config, stacked=True), layers_of(model), strict=True)
    return [empty_factors(layer, slots, dtype, (len(spot.repeats),), mesh) for spot, layer in found]


def beside_layers(model: Unstacked, slots: AdapterSlots) -> Room:
    """Room for layers written out."""
    dtype = jnp.dtype(model.outer.config.dtype)
    return [empty_factors(layer, slots, dtype) for layer in model.blocks]


def into_stacks(model: Transformer, room: Room, rows_b: Int[Array, "b"]) -> Transformer:
    """The model with its room, each row with its adapter."""
    copy, parts = with_parts(model, lambda part: part), iter(room)
    stacks = []
    for config, stack in zip(model.config.stacks, model.stacks, strict=True):
        rows_lb = jnp.broadcast_to(rows_b, (config.repeats, *rows_b.shape))
        own = with_parts(cast(Any, stack), lambda part: part)
        own.layers = nnx.List([attached(layer, next(parts), rows_lb) for layer in own.layers])
        stacks.append(own)
    copy.stacks = nnx.List(stacks)
    return copy


def into_layers(model: Unstacked, room: Room, rows_b: Int[Array, "b"]) -> Unstacked:
    """As `into_stacks`."""
    blocks = (attached(layer, part, rows_b) for layer, part in zip(model.blocks, room, strict=True))
    return model._replace(blocks=tuple(blocks))


def filled(adapter: Adapter, room: Room, config: TransformerConfig, *, stacked: bool) -> Room:
    """An adapter as wide as one place of a room, on the host."""
    new = []
    for spot, part in zip(spots(config, stacked=stacked), room, strict=True):
        own = {}
        for name, like in part.items():
            where = [(spot.stack, spot.place, repeat, name) for repeat in spot.repeats]
            each = [padded(adapter, at, like, 2 if stacked else 1) for at in where]
            own[name] = jax.tree.map(lambda *x: np.stack(x), *each) if stacked else each[0]
        new.append(own)
    return new
