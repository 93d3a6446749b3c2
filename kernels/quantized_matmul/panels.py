"""Weights of 8 and 4 bits as C++ reads them on a CPU: in panels of sixteen outputs, for any number of rows.

A row's product is the same to the last bit however many rows there are, as with float weights in panels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight, in_bytes

SIGNS = 0x88888888
"""The highest bit of each value of a word: flipped, a value is itself plus 8."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelWeight:
    """A matrix [N outputs, K inputs] in ⌈N/16⌉ panels; the last one is filled up. Arrays may have an axis of matrices
    in front."""

    # Any: jax puts other things where arrays are.
    values: Any
    """int8 [p, K, 16]; or uint32 [p, ⌈K/8⌉, 16] with eight inputs' values plus 8 in a word, the first one lowest."""
    scale: Any
    """float32 [16 p] for int8; or bfloat16 [p, ⌈K/group⌉, 16]."""
    zero: Any
    """Shaped and typed as `scale`, and (8 + zero point) / 8; None: no zero points."""
    outputs: int = dataclasses.field(metadata={"static": True})
    """N."""
    inputs: int = dataclasses.field(metadata={"static": True})
    """K."""
    group: int = dataclasses.field(metadata={"static": True})
    """Inputs that share a scale."""


def in_panels(w: QuantizedWeight) -> PanelWeight:
    """The weight, or the matrices stacked in it, laid out anew by the host, in numpy's arrays."""
    if w.values.ndim == 3:
        each = [in_panels(jax.tree.map(lambda a, i=i: a[i], w)) for i in range(w.values.shape[0])]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *each)
    sizes = {"outputs": w.outputs, "inputs": w.inputs, "group": w.group}
    if w.bits == 8:
        scale = filled(np.asarray(w.scale, np.float32).reshape(-1))
        return PanelWeight(values=panels(np.asarray(w.values)), scale=scale, zero=None, **sizes)
    packed = np.asarray(w.values if w.values.dtype == jnp.uint8 else in_bytes(w.values))
    if short := -packed.shape[1] % 4:
        packed = np.pad(packed, ((0, 0), (0, short)))
    words = panels(np.ascontiguousarray(packed).view("<u4")) ^ np.uint32(SIGNS)
    scale = panels(np.asarray(w.scale).T)
    zero = None if w.zero is None else panels((8 + np.asarray(w.zero, np.float32).T) / 8)
    return PanelWeight(
        values=words,
        scale=scale,
        zero=None if zero is None else zero.astype(jnp.dtype(jnp.bfloat16)),
        **sizes,
    )


def filled(array: np.ndarray) -> np.ndarray:
    """With zeros behind, to whole panels of outputs."""
    short = -array.shape[0] % cpu_native.PANEL
    return np.pad(array, ((0, short), *((0, 0),) * (array.ndim - 1))) if short else array


def panels(array_nk: np.ndarray) -> np.ndarray:
    """[N, K] as [p, K, 16]."""
    whole = filled(array_nk)
    return np.ascontiguousarray(whole.reshape(-1, cpu_native.PANEL, whole.shape[1]).swapaxes(1, 2))


def panel_matmul(
    x_tk: Float[Array, "t k"], w: PanelWeight, group_sizes_e: Int[Array, "e"] | None = None
) -> Float[Array, "t n"]:
    """`x w^T`, summed in float32 and left so. With sizes each row, sorted by group, meets the matrix of its group; rows
    of no group give 0."""
    x_tk = x_tk.astype(jnp.float32)
    sizes_e = None if group_sizes_e is None else group_sizes_e.astype(jnp.int32)
    if w.values.dtype == jnp.int8:
        y_tn = cpu_native.panel_product(x_tk, w.values, w.scale, sizes_e)
    else:
        y_tn = cpu_native.int4_panel_product(x_tk, w.values, w.scale, w.zero, sizes_e, group=w.group)
    return y_tn[:, : w.outputs]


def from_panels(w: PanelWeight) -> Float[Array, "n k"]:
    """The matrix that the weight stands for, in float32."""
    w = jax.tree.map(jnp.asarray, w)
    if w.values.dtype == jnp.int8:
        full = w.values * w.scale.reshape(-1, 1, cpu_native.PANEL)
    else:
        shifts = 4 * jnp.arange(cpu_native.VALUES_A_WORD, dtype=jnp.uint32)
        u_pcjo = (w.values[:, :, None] >> shifts[:, None]) & 15
        u_pko = u_pcjo.reshape(w.values.shape[0], -1, cpu_native.PANEL)[:, : w.inputs].astype(jnp.float32)
        least = 8.0 if w.zero is None else 8.0 * each_input(w, w.zero)
        full = (u_pko - least) * each_input(w, w.scale)
    return jnp.swapaxes(full, 1, 2).reshape(-1, w.inputs)[: w.outputs]


def each_input(w: PanelWeight, of_groups_pgo: Array) -> Float[Array, "p k 16"]:
    """A number for each group, for each of its inputs."""
    return jnp.repeat(of_groups_pgo.astype(jnp.float32), w.group, axis=1)[:, : w.inputs]
