"""Models whose linear layers and experts hold weights of 8 or 4 bits, rounded to nearest: less memory, and less to read
a token.

What stays as it is: token and position tables, norms, biases, routers, and the matrices that multi-head latent
attention uses whole. The output projection is held in int8 whatever the kind: its
error goes straight into the logits. Where it is the token table, that stays too, for looking tokens up.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array

from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels.dispatch import chip
from maxstack.kernels.quantized_matmul import KINDS, Kind, QuantizedWeight, Storage, quantize
from maxstack.models import tree
from maxstack.models.layers import Linear
from maxstack.models.moe import MoE
from maxstack.models.packed import ARRAYS, Packed, PackedLinear, PackedMatrix
from maxstack.models.transformer import Transformer

HEAD_KIND: Kind = "int8"
RUN = 1 << 24
"""Weights that are rounded at once: 64 MiB in float32, a few times that while they are."""


class Place(NamedTuple):
    """A leaf that is packed, and how its last axes make a matrix."""

    packed: str
    """Name of the PackedMatrix that takes its values."""
    kind: Kind
    axes: int
    """Axes of one matrix; those before them are stacked."""
    contract: int
    """Of these, the first ones that are inputs; 0: the table of a tied output projection, [outputs, inputs]."""
    kept: bool = False
    """The leaf itself stays too."""


class Packing:
    """How the leaves of a model become those of its packed form, one after the other."""

    def __init__(self, abstract: Transformer, kind: Kind, mesh: Mesh | None = None):
        """`abstract` has shapes in place of arrays; what is packed is cut over the devices of `mesh`.

        Raises UserError for an unknown kind, and for what does not divide by the mesh.
        """
        if kind not in KINDS:
            raise UserError(f"weights {kind!r} are not known; these are: {', '.join(KINDS)}")
        self.kind = kind
        self.storage: Storage = "bytes" if chip().platform == "cpu" else "int4"
        self.places = {f"{name}.w": place_of(name, linear, kind) for name, linear in linears(abstract)}
        self.places |= {name: Place(name, kind, 2, 1) for name, _ in experts(abstract)}
        self.places |= head_place(abstract)
        self.abstract: Transformer = jax.eval_shape(lambda model: packed_form(model, self), abstract)
        self.homes = None if mesh is None else homes_of(self.abstract, mesh)

    @property
    def read_on(self) -> dict[str, Sharding]:
        """Where the leaves that are packed are read to, one after the other, before they are cut over a mesh: the
        host's memory where jax may use it, since no single chip need have room for one."""
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # jax was told to know accelerators only
            host = jax.local_devices()[0]
        return dict.fromkeys(self.places, SingleDeviceSharding(host))

    def __call__(self, leaf: str, array: jax.Array) -> dict[str, jax.Array]:
        """What the packed model has in place of a leaf, by name.

        Matrix by matrix, and a large one in runs of outputs: beside the leaf itself, only so much is there in float32.
        Raises UserError for weights that are not finite.
        """
        if leaf not in self.places:
            return {leaf: array}
        place = self.places[leaf]
        stacked = array.shape[: array.ndim - place.axes]
        parts = [packed_matrix(array[index], place, self.storage) for index in np.ndindex(*stacked)]
        found: dict[str, Any] = {leaf: array} if place.kept else {}
        for at, name in enumerate(ARRAYS):
            arrays = [part[at] for part in parts]
            if name == "scale" and not all(np.isfinite(a.astype(np.float32)).all() for a in arrays):
                raise UserError(
                    f"{leaf} has weights that are not finite: they cannot be rounded to {place.kind}"
                )
            whole = arrays[0] if not stacked else np.stack(arrays).reshape(*stacked, *arrays[0].shape)
            found[f"{place.packed}.{name}"] = jnp.asarray(whole) if self.homes is None else whole
        return (
            found
            if self.homes is None
            else {key: jax.device_put(a, self.homes[key]) for key, a in found.items()}
        )


def place_of(name: str, linear: Linear, kind: Kind) -> Place:
    """Where a linear layer's weight goes."""
    return Place(f"{name}.w", kind, len(linear.axes), linear.contract)


def head_place(abstract: Transformer) -> dict[str, Place]:
    """Where the output projection goes."""
    if abstract.head is None:
        return {"embedding.table": Place("head", HEAD_KIND, 2, 0, kept=True)}
    return {"head": Place("head", HEAD_KIND, 2, 1)}


def matrix_of(array: Array, contract: int) -> Array:
    """One leaf's matrix as [outputs, inputs]."""
    return array if contract == 0 else array.reshape(math.prod(array.shape[:contract]), -1).T


def quantized(array: Array, place: Place, storage: Storage) -> QuantizedWeight:
    """One matrix, rounded."""
    return rounded(array, place.contract, place.kind, storage)


def packed_matrix(array: Array, place: Place, storage: Storage) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of one matrix, run by run."""
    outputs = array.size // math.prod(array.shape[: place.contract] or array.shape[1:])
    size = max(1, RUN // (array.size // outputs))
    found = []
    for start in range(0, outputs, size):
        if size >= outputs:
            run = array
        elif place.contract == 0:
            run = array[start : start + size]
        else:  # [inputs, outputs], so that a run of outputs is a slice
            run = array.reshape(-1, outputs)[:, start : start + size]
        own = place if size >= outputs or place.contract == 0 else place._replace(contract=1)
        w = quantized(run, own, storage)
        found.append((np.asarray(w.values), np.asarray(w.scale)))
    values, scales = zip(*found, strict=True)
    return np.concatenate(values, 0), np.concatenate(scales, 1)


@jax.jit(static_argnums=(1, 2, 3))
def rounded(array: Array, contract: int, kind: Kind, storage: Storage) -> QuantizedWeight:
    return quantize(matrix_of(array, contract), kind, storage=storage)


def linears(module: Any, name: str = "") -> Iterator[tuple[str, Linear]]:
    """Every linear layer that can be packed, by dotted name."""
    if type(module) is Linear:
        yield name, module
        return
    whole = getattr(type(module), "used_whole", ())
    for part, value in parts(module):
        if part not in whole:
            yield from linears(value, f"{name}.{part}" if name else part)


def experts(module: Any, name: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """The dotted name of every weight of routed experts, a matrix [inputs, outputs] for each of them, and the axes."""
    if isinstance(module, MoE):
        yield from ((f"{name}.{matrix}", axes) for matrix, axes in MoE.matrices.items())
    for part, value in parts(module):
        yield from experts(value, f"{name}.{part}" if name else part)


def parts(module: Any) -> Iterator[tuple[str, Any]]:
    """The modules that a module or a list of modules holds."""
    if isinstance(module, nnx.List):
        yield from ((str(i), each) for i, each in enumerate(module))
    elif isinstance(module, nnx.Module):
        yield from (
            (key, value) for key, value in vars(module).items() if isinstance(value, nnx.Module | nnx.List)
        )


def homes_of(abstract: Transformer, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each leaf of a packed model goes: cut as parameters are, but for inputs of which no device would have
    whole groups. UserError if a leaf cannot be cut."""
    homes = sharding.weight_shardings(mesh, tree.axes(abstract), "parameters", 3)
    for name, matrix in matrices(abstract):
        values, scale = (f"{name}.{array}" for array in ARRAYS)
        *stacked, outputs, inputs = homes[values].spec
        ways = sharding.parts(mesh, inputs)
        if matrix.inputs % (ways * matrix.group) and matrix.group != matrix.inputs:
            homes[values] = NamedSharding(mesh, jax.P(*stacked, outputs, None))
            homes[scale] = NamedSharding(mesh, jax.P(*stacked, None, outputs))
    sharding.check_divides({leaf: a.shape for leaf, a in tree.leaves(abstract).items()}, homes)
    return homes


def matrices(module: Any, name: str = "") -> Iterator[tuple[str, PackedMatrix]]:
    """Every packed matrix by dotted name."""
    if isinstance(module, PackedMatrix):
        yield name, module
        return
    for part, value in parts(module):
        yield from matrices(value, f"{name}.{part}" if name else part)


def packed_form(model: Transformer, packing: Packing) -> Transformer:
    """The packed model all at once, for its shapes."""

    def weight(array: Array, place: Place) -> QuantizedWeight:
        pack = lambda one: quantized(one, place, packing.storage)  # noqa: E731
        for _ in range(array.ndim - place.axes):
            pack = jax.vmap(pack)
        return pack(array)

    changes: dict[str, Any] = {
        name: PackedLinear(linear, weight(linear.w[...], packing.places[f"{name}.w"]))
        for name, linear in linears(model)
    }
    leaves = tree.leaves(model)
    changes |= {
        name: PackedMatrix(weight(leaves[name], packing.places[name]), ("expert", *reversed(axes)))
        for name, axes in experts(model)
    }
    ((leaf, place),) = head_place(model).items()
    changes["head"] = PackedMatrix(weight(leaves[leaf], place), ("vocab", "embed"))
    return tree.replace(model, changes)


def packed(model: Transformer, kind: Kind) -> Transformer:
    """`model` with its linear layers and experts packed; arrays that stay are shared. Raises UserError for an unknown
    kind."""
    if is_packed(model):
        raise UserError("the model's weights are packed already: load it again to pack them in another way")
    packing, arrays = Packing(jax.eval_shape(lambda: model), kind), {}
    for leaf, array in tree.leaves(model).items():
        arrays |= packing(leaf, array)
    return tree.rebuild(packing.abstract, arrays)


def is_packed(model: Transformer) -> bool:
    """Whether any weight is in few bits."""
    return any(isinstance(variable, Packed) for variable in tree.named_variables(model).values())


def refuse_packed(model: Transformer, what: str) -> None:
    """Raise UserError for a model with packed weights."""
    if is_packed(model):
        raise UserError(
            f"{what}: the model's weights are packed in few bits, which is not written: load it again without "
            "weights=… and write that"
        )
