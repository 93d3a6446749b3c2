"""What XLA is told about programs that read all weights for a few tokens, so that it copies none of them."""

from typing import Any

from jax.experimental.layout import Format, Layout

from maxstack.kernels.dispatch import chip

TILES = {"v7x": (16, 128)}
"""Tiles of bfloat16 matrices that XLA multiplies with on a chip, where arrays have others unless told (8 × 128): it
then lays out the matrices of all layers anew in every step (libtpu 0.0.48.1)."""

FOR_GPUS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def reading_weights() -> dict[str, Any] | None:
    """Compiler options of generation's and the server's programs.

    XLA for GPUs (jax 0.11.2) cuts a layer's matrices out of their stack for its Triton kernels to multiply with; cuBLAS
    it tells where in the stack they are. And it joins matrices that are multiplied with the same x, gate and up for
    example, where they are small: by a copy of both in every step.
    """
    return FOR_GPUS if chip().platform == "gpu" else None


def format_for(leaf: Any, where: Any) -> Any:
    """How stacked matrices of a product [layers, …, rows, columns] shall lie on the chip: in tiles, or None for as
    arrays lie anyway. `where` is the sharding they have."""
    tile = TILES.get(chip().name)
    if tile is None or where is None or leaf.dtype != "bfloat16" or leaf.ndim < 3:
        return None
    # Fewer rows than a tile has are not copied; told of such tiles, XLA's compiler ends the process.
    if where.shard_shape(leaf.shape)[-2] % tile[0]:
        return None
    return Format(Layout(tuple(range(leaf.ndim)), (tile, (2, 1))), where)


def lies(leaf: Any) -> Any:
    """Where an array of jax lies, and how if that may differ from others of its shape."""
    return leaf.format if chip().name in TILES else leaf.sharding
