"""How the TPU kernels of grouped products cut a call into tiles, and what of the chip's memory those may take."""

from typing import NamedTuple

from jaxtyping import Array

from maxstack.kernels.dispatch import chip
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

LANES, EIGHT = 128, 8
MOST_ROWS, MOST_PART = 512, 128
"""Of a tile of rows, and of what of it is multiplied or left out at a time."""
VMEM_MIB = {"v5e": 96, "v5p": 56, "v6e": 96, "v7x": 56}
"""On-chip memory a kernel may take: three quarters of the 128 MiB of a v5e or v6e, seven eighths of 64 MiB."""
FEWEST_VMEM_MIB = 14
"""Of a generation without a number above: no more than the 16 MiB of the smallest."""
MOST_PACKED_INPUTS = 2048
MOST_WHOLE = 4096
"""A size that is no multiple of the lanes is taken whole."""


class Tiles(NamedTuple):
    """What one step of the grid works on."""

    rows: int
    part: int
    """Rows that are multiplied at a time, where not all of a tile are the group's."""
    outputs: int
    inputs: int


def vmem_bytes() -> int:
    """What a kernel may take."""
    return VMEM_MIB.get(chip().name, FEWEST_VMEM_MIB) * 2**20


def row_tiles(rows: int, groups: int, itemsize: int) -> tuple[int, int]:
    """(rows of a tile, rows of a part of it): parts near the mean group's size, so that few rows are multiplied in
    vain; tiles of several."""
    least = 32 // itemsize  # rows of a tile in VMEM
    mean = 1 << max(rows // groups - 1, 0).bit_length()
    part = min(max(mean, least), MOST_PART)
    whole = -(-rows // part) * part
    return min(whole, part * 8, max(MOST_PART, min(2 * mean, MOST_ROWS))), part


def cut(size: int, most: int, unit: int = LANES) -> int:
    """The largest multiple of `unit`, or else of the lanes, that divides a size and is no more than `most`; or the
    size, where none is."""
    fitting = (n for step in (unit, LANES) for n in range(most // step * step, 0, -step) if size % n == 0)
    return size if size <= most else next(fitting, size)


def tiles_for(
    rows: int,
    groups: int,
    inputs: int,
    outputs: int,
    w_bits: int,
    itemsize: int,
    vmem: int,
    unit: int = LANES,
) -> Tiles:
    """All inputs at a time where the matrix of a group, in columns wide enough, fits twice: then it is fetched once.
    Of packed weights, which are widened in code for each group of inputs, no more than MOST_PACKED_INPUTS; a multiple
    of `unit` if that can be."""
    tile, part = row_tiles(rows, groups, itemsize)
    budget = vmem * 2 // 3
    most = inputs if w_bits >= 16 else MOST_PACKED_INPUTS
    for most_inputs in (most, 4096, 2048, 1024, 512, 256, LANES):
        bk = cut(inputs, most_inputs, unit)
        # Twice of everything that is fetched or written, and the sums.
        fixed, each = 2 * tile * bk * itemsize, 2 * bk * w_bits // 8 + 2 * tile * itemsize + 4 * tile
        bn = cut(outputs, max(min((budget - fixed) // each, 1024), LANES))
        if fixed + each * bn <= budget and (bn >= min(512, outputs) or most_inputs <= 1024):
            return Tiles(tile, part, bn, bk)
    return Tiles(tile, part, cut(outputs, LANES), cut(inputs, LANES))


def tiles_of(x_td: Array, w: Array | QuantizedWeight, groups: int, transposed: bool) -> Tiles:
    """`tiles_for` a call."""
    (rows, d), f, itemsize = x_td.shape, w.shape[1 if transposed else 2], x_td.dtype.itemsize
    quantized = isinstance(w, QuantizedWeight)
    bits = w.bits if quantized else 8 * itemsize
    unit = EIGHT * w.group if quantized and w.group != w.inputs else LANES
    return tiles_for(rows, groups, d, f, bits, itemsize, vmem_bytes(), unit)


def scale_lies(w: QuantizedWeight, inputs: int) -> bool:
    """Whether the scales of a tile of inputs are read as they lie: whole runs of eight groups. Others XLA would copy,
    and of a stack all, so that there the groups' own are cut out."""
    return inputs % (EIGHT * w.group) == 0


def matrix_tiles(rows: int, groups: int, inputs: int, outputs: int, itemsize: int, vmem: int) -> Tiles:
    """Large tiles of the matrix: a row is fetched once for each tile of the other side."""
    tile, part = row_tiles(rows, groups, itemsize)
    bd = cut(inputs, 1024)
    fixed, each = 2 * tile * bd * itemsize, 2 * bd * itemsize + 8 * bd + 2 * tile * itemsize
    bf = cut(outputs, max(min((vmem // 2 - fixed) // each, 2048), LANES))
    return Tiles(tile, part, bf, bd)
