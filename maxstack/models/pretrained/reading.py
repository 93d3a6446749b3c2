"""From the tensors of a file to the arrays of a model, straight into the shards of their devices.

Leaf after leaf: the host holds the shards of one leaf (or of the few that share a fused tensor) and, beside them, one
tensor for each reading thread. On a CPU the shards are the arrays: they are aligned so that jax takes them as they are.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from maxstack.config import UserError
from maxstack.models.families.weights import Entry, read_into
from maxstack.models.files.source import TensorSource

ALIGNMENT = 64
"""Bytes; what jax asks of host memory that a CPU array may share."""
TILE_ROWS = 32
"""Rows of a tensor that are transposed at a time: as many as stay in the first cache with their target."""
THREADS = min(4, os.cpu_count() or 1)
# From a leaf and its array to the leaves that are kept in its place.
Finish = Callable[[str, jax.Array], dict[str, jax.Array]]


class Shard(NamedTuple):
    """A part of a leaf that some of this process's devices hold."""

    index: tuple[slice, ...]
    array: np.ndarray
    devices: tuple[jax.Device, ...]


def read_leaves(
    places: Sequence[Entry], shapes: Mapping[str, jax.ShapeDtypeStruct], source: TensorSource,
    shardings: Mapping[str, Sharding], unused: Sequence[str] = (), finish: Finish | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Every leaf in `shapes` as an array of that shape and type, with its sharding; or what `finish` makes of it, as
    soon as it is there.

    Raises UserError, before anything is read, for tensors that are missing, of another shape, not of floating point,
    or unknown and not among the patterns `unused`.
    """
    check_tensors(places, source, unused)
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for leaves, entries in together(places):
            targets = {leaf: shards_of(shapes[leaf], shardings[leaf]) for leaf in leaves}
            by_tensor: dict[str, list[Entry]] = {}
            for entry in entries:
                by_tensor.setdefault(entry.source, []).append(entry)
            jobs = [pool.submit(fill, targets, shapes, parts, source) for parts in by_tensor.values()]
            for job in jobs:
                job.result()
            for leaf, shards in targets.items():
                array = assembled(shapes[leaf], shardings[leaf], shards)
                arrays |= {leaf: array} if finish is None else finish(leaf, array)
    return arrays


def check_tensors(places: Sequence[Entry], source: TensorSource, unused: Sequence[str]) -> None:
    """Raise UserError when the file's tensors are not those that the model needs."""
    needed, present = {entry.source: entry for entry in places}, set(source.names())
    missing = sorted(needed.keys() - present)
    patterns = [re.compile(pattern) for pattern in unused]
    extra = sorted(n for n in present - needed.keys() if not any(p.fullmatch(n) for p in patterns))
    if missing or extra:
        told = [f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                for what, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise UserError(
            f"{source.where}: the weights are not those that the model's configuration describes: {'; '.join(told)}. "
            "Take configuration and weights from the same model"
        )
    for name, entry in needed.items():
        shape, dtype = source.info(name)
        if tuple(shape) != entry.form.shape:
            raise UserError(
                f"{source.where}: {name} has shape {list(shape)}, the configuration asks for {list(entry.form.shape)}"
            )
        if dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise UserError(
                f"{source.where}: {name} is {dtype}; weights of float32, float16 or bfloat16 are read"
            )


def together(places: Sequence[Entry]) -> Iterator[tuple[list[str], list[Entry]]]:
    """The leaves that share tensors, with all their entries, group by group."""
    group: dict[str, str] = {}

    def root(leaf: str) -> str:
        while group.setdefault(leaf, leaf) != leaf:
            leaf = group[leaf]
        return leaf

    first: dict[str, str] = {}
    for entry in places:
        group[root(entry.leaf)] = root(first.setdefault(entry.source, entry.leaf))
    grouped: dict[str, list[Entry]] = {}
    for entry in places:
        grouped.setdefault(root(entry.leaf), []).append(entry)
    for entries in grouped.values():
        yield list(dict.fromkeys(entry.leaf for entry in entries)), entries


def shards_of(shape: jax.ShapeDtypeStruct, sharding: Sharding) -> list[Shard]:
    """Host memory for each different part of a leaf that devices of this process hold."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
        whole = index if index is not None else (slice(None),) * len(shape.shape)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(whole, shape.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    return [
        Shard(tuple(slice(*b) for b in bounds), aligned([b - a for a, b in bounds], shape.dtype), tuple(held))
        for bounds, held in devices.items()
    ]


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised host memory that begins at a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def fill(
    targets: Mapping[str, Sequence[Shard]], shapes: Mapping[str, jax.ShapeDtypeStruct], entries: Sequence[Entry],
    source: TensorSource,
) -> None:  # fmt: skip
    """Read one tensor, and write its parts into the shards that hold any of them."""
    wanted = [(entry, shard) for entry in entries for shard in targets[entry.leaf] if holds(shard, entry)]
    if not wanted:
        return
    tensor = source.read(entries[0].source)
    views: dict[int, np.ndarray] = {}
    for entry, shard in wanted:
        if id(entry) not in views:
            views[id(entry)] = viewed(entry, shapes[entry.leaf].shape[len(entry.index) :], tensor)
        lead = tuple(at - part.start for at, part in zip(entry.index, shard.index, strict=False))
        copy(shard.array[lead], views[id(entry)][shard.index[len(entry.index) :]])


def holds(shard: Shard, entry: Entry) -> bool:
    """Whether the shard has any of the entry's layer (and expert)."""
    return all(part.start <= at < part.stop for at, part in zip(entry.index, shard.index, strict=False))


def viewed(entry: Entry, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
    """The leaf's part of a tensor, in the leaf's own shape."""
    if entry.form.direct:
        return entry.form.view(tensor)
    part = np.empty(shape, tensor.dtype)
    read_into(part, entry.form, tensor)
    return part


def copy(target: np.ndarray, view: np.ndarray) -> None:
    """`target[...] = view`, a few rows of the underlying tensor at a time: thrice as fast for a transposed one."""
    if view.size < 2**16 or view.flags.c_contiguous:
        target[...] = view
        return
    slowest = int(np.argmax(view.strides))
    row = view.shape[int(np.argmin(np.where(np.asarray(view.shape) > 1, view.strides, 2**62)))]
    step = max(1, TILE_ROWS * row * view.itemsize // max(view.strides[slowest], 1))
    before = (slice(None),) * slowest
    for start in range(0, view.shape[slowest], step):
        part = (*before, slice(start, start + step))
        target[part] = view[part]


def assembled(shape: jax.ShapeDtypeStruct, sharding: Sharding, shards: Sequence[Shard]) -> jax.Array:
    """The array whose parts the shards are."""
    parts = [jax.device_put(shard.array, device) for shard in shards for device in shard.devices]
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, parts)
