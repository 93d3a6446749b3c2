"""Attention on a TPU, in Mosaic kernels: sizes of blocks, what is declined, and arrays into blocks and back."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from maxstack.kernels import tiles
from maxstack.kernels.attention.derivative import differentiable
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.dispatch import chip, only_on


@dataclass(frozen=True, kw_only=True)
class TpuBlocks:
    """Sizes of the blocks of `mosaic_tpu`; they change its speed and memory, not its result."""

    rows: int = 1024
    """Queries times query heads of one kv head, a block of the forward pass."""
    key: int = 1024
    """Keys that are fetched at a time (positions)."""
    chunk: int = 512
    """Keys that are multiplied at a time (positions); a multiple of 128."""
    backward_rows: int = 1024
    backward_key: int = 1024
    backward_chunk: int = 512
    vmem_mib: int = 48
    """On-chip memory a kernel may take (MiB)."""
    dq_mib: int = 32
    """What of it the gradient of the queries of one kv head may take, so that one backward kernel does all (MiB);
    half of it where inputs are float32, with which all the rest takes twice as much."""

    def __post_init__(self):
        for name in ("chunk", "backward_chunk"):
            if (size := getattr(self, name)) < 128 or size % 128:
                raise ValueError(f"TpuBlocks: {name} is {size} positions; it must be a multiple of 128")


MEMORY = {"v5e": (96, 72), "v5p": (56, 32), "v6e": (96, 72), "v7x": (56, 32)}
"""`vmem_mib` and `dq_mib` of a chip: three quarters of the 128 MiB of a v5e or v6e, seven eighths of the 64 MiB of a
v5p or v7x core. Its blocks are in `kernels/tiles.json`; none was measured here."""
DEFAULT = TpuBlocks(
    rows=512,
    key=512,
    chunk=256,
    backward_rows=512,
    backward_key=512,
    backward_chunk=256,
    vmem_mib=14,
    dq_mib=0,
)
"""Of a generation that no table knows: no more than the 16 MiB of the smallest."""
AXES = {"rows": (256, 512, 1024, 2048), "key": (512, 1024, 2048), "chunk": (128, 256, 512, 1024)}
MOST_HEAD_SIZE = 256
MOST_SCALARS = 200_000
"""Of 2**18 numbers that scalar memory holds."""


def declined(q_btnh, k_bskh, v_bskw, options: Options, at: Coordinates, config: object) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    if (reason := only_on("tpu")) is not None:
        return reason
    if chip().name in ("v2", "v3"):
        return f"kernels of a {chip().name} multiply no bfloat16, and its scalar memory is too small; it needs a v4"
    if config is not None and not isinstance(config, TpuBlocks):
        return f"it takes mosaic_tpu.TpuBlocks, and config is {type(config).__name__}"
    if q_btnh.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, and q is {q_btnh.dtype}"
    if (size := max(q_btnh.shape[3], v_bskw.shape[3])) > MOST_HEAD_SIZE:
        return f"head size {size} is above {MOST_HEAD_SIZE}, for which its blocks are made"
    if 0 in (*q_btnh.shape, *k_bskh.shape):
        return f"it takes no empty arrays, and q is {q_btnh.shape}, k {k_bskh.shape}"
    if auto := _automatic_axes(q_btnh):
        return f"a kernel cannot be divided over mesh axes {auto} by the compiler; make them Explicit"
    return _scalar_memory(q_btnh, k_bskh, at, options, config or _blocks(q_btnh, k_bskh, v_bskw))


def _automatic_axes(array) -> tuple[str, ...]:
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1)


def _scalar_memory(q_btnh, k_bskh, at, options, blocks) -> str | None:
    """Why scalar memory cannot hold the bounds of all blocks."""
    from maxstack.kernels.attention.mosaic_tpu_tiling import needed, scalar_count

    given = any(ids is not None for ids in needed(at, options))
    for tiling in _tilings(q_btnh, k_bskh, blocks):
        count = scalar_count(tiling, q_btnh.shape[0] if given else 1)
        if count > MOST_SCALARS:
            return (
                f"bounds of the blocks of {q_btnh.shape[0]} rows of {tiling.t} queries and {tiling.s} keys are "
                f"{count:,} numbers, and scalar memory holds {MOST_SCALARS:,}; use fewer rows or larger blocks"
            )
    return None


def _tilings(q_btnh, k_bskh, blocks: TpuBlocks):
    """Of the forward and of the backward pass."""
    from maxstack.kernels.attention.mosaic_tpu_tiling import tile

    t, n = q_btnh.shape[1:3]
    s, k = k_bskh.shape[1:3]
    sizes = (
        (blocks.rows, blocks.key, blocks.chunk),
        (blocks.backward_rows, blocks.backward_key, blocks.backward_chunk),
    )
    return [tile(t, s, n // k, rows=rows, key=key, chunk=chunk) for rows, key, chunk in sizes]


def _blocks(q_btnh, k_bskh, v_bskw) -> TpuBlocks:
    """What the tables have for a call on this chip."""
    (t, h), (s, w) = q_btnh.shape[1::2], v_bskw.shape[1::2]
    shape = {
        "t": tiles.about(t),
        "s": tiles.about(s),
        "g": q_btnh.shape[2] // k_bskh.shape[2],
        "h": h,
        "w": w,
    }
    sizes = {}
    for which, prefix in (("forward", ""), ("backward", "backward_")):
        rule = {name: getattr(DEFAULT, prefix + name) for name in AXES}
        name = f"attention.mosaic_tpu.{which}"
        found = tiles.chosen(name, q_btnh.dtype, shape, rule, axes=AXES, fault=_fault)
        sizes |= {prefix + name: size for name, size in found.items()}
    vmem_mib, dq_mib = MEMORY.get(chip().name, (DEFAULT.vmem_mib, DEFAULT.dq_mib))
    return TpuBlocks(**sizes, vmem_mib=vmem_mib, dq_mib=dq_mib)


def _fault(sizes: tiles.Sizes) -> str | None:
    """Why the kernels cannot take blocks."""
    rows, key, chunk = sizes["rows"], sizes["key"], sizes["chunk"]
    if rows % 128 or chunk % 128 or key % chunk:
        return f"{rows} rows and chunks of {chunk} must be multiples of 128, and {key} keys whole chunks"
    return None


# The kernels are imported where they are used: the import of Pallas takes a third of a second.


def _forward(options, config, q_btnh, k_bskh, v_bskw, sinks_n, at):
    from maxstack.kernels.attention import mosaic_tpu_arrays as arrays
    from maxstack.kernels.attention.mosaic_tpu_forward import forward
    from maxstack.kernels.attention.mosaic_tpu_tiling import Scalars, needed

    blocks, at = config or _blocks(q_btnh, k_bskh, v_bskw), needed(at, options)
    tiling, _ = _tilings(q_btnh, k_bskh, blocks)
    sinks = None
    if sinks_n is not None:
        sinks = jnp.repeat(sinks_n.astype(jnp.float32).reshape(-1, 1, tiling.heads), tiling.query, axis=2)
    q, k = arrays.rows_of(q_btnh, tiling), arrays.chunks_of(k_bskh, tiling)
    v_t, ids = arrays.chunks_of(v_bskw, tiling, keys_last=True), arrays.ids_of(at, tiling)
    scalars = Scalars(options, tiling, at, "query")
    out, lse = forward(options, scalars, blocks.vmem_mib * 2**20, q, k, v_t, sinks, ids)
    return arrays.from_rows(out, tiling), arrays.from_rows(lse, tiling)[..., 0]


def _backward(options, config, q_btnh, k_bskh, v_bskw, at, lse, delta, dout):
    from maxstack.kernels.attention import mosaic_tpu_arrays as arrays
    from maxstack.kernels.attention.mosaic_tpu_backward import dq_bytes, keys_backward, queries_backward
    from maxstack.kernels.attention.mosaic_tpu_tile import LOG2_E
    from maxstack.kernels.attention.mosaic_tpu_tiling import Scalars, needed

    blocks, at = config or _blocks(q_btnh, k_bskh, v_bskw), needed(at, options)
    _, tiling = _tilings(q_btnh, k_bskh, blocks)
    q, dout = arrays.rows_of(q_btnh, tiling), arrays.rows_of(dout.astype(q_btnh.dtype), tiling)
    lse_delta = [  # of padded queries +inf and 0: no weight
        arrays.rows_of(a[..., None], tiling, fill=fill).swapaxes(3, 4)
        for a, fill in ((lse * LOG2_E, jnp.inf), (delta, 0.0))
    ]
    lse_delta = jnp.concatenate(lse_delta, axis=3)
    k, v, ids = arrays.chunks_of(k_bskh, tiling), arrays.chunks_of(v_bskw, tiling), arrays.ids_of(at, tiling)
    k_t = arrays.chunks_of(k_bskh, tiling, keys_last=True)
    vmem_bytes, scalars = blocks.vmem_mib * 2**20, Scalars(options, tiling, at, "key")
    itemsize = q.dtype.itemsize
    together = dq_bytes(tiling, q.shape[4], itemsize) <= blocks.dq_mib * 2**20 * 2 // itemsize
    dk, dv, dq = keys_backward(
        options, scalars, vmem_bytes, q, k, k_t if together else None, v, dout, lse_delta, ids
    )
    if not together:
        scalars = Scalars(options, tiling, at, "query")
        dq = queries_backward(options, scalars, vmem_bytes, q, k, k_t, v, dout, lse_delta, ids)
    return arrays.from_rows(dq, tiling), arrays.from_chunks(dk, tiling), arrays.from_chunks(dv, tiling)


attention = differentiable(_forward, _backward)
