"""Numbers of 4 and 8 bits become bfloat16 in the registers from which `wgmma` takes its left operand.

Of sixteen columns a thread gives `wgmma` four: two neighbours and two that are eight behind. A word of shared memory
holds neighbours only. To bring them where they belong takes two shuffles a word and as many choices of bytes. They stay
where they are instead: a product sums over its columns in any order, if the right operand has its rows in the same
order, `ordered`. Which order that is comes from what takes numbers apart in the fewest instructions:

    a word of thread t     n7 n6 n5 n4 n3 n2 n1 n0      columns 8t, 8t + 1, … 8t + 7 of 32
    shifted by 4j, masked  .. .. .. n(4+j) .. .. .. nj  count as columns 8j + 2t and 8j + 2t + 1

The masked bits become the last of a mantissa, under the exponent of 128, which is subtracted. Of 4 bits the sign is
turned around before and 8 more are subtracted; of 8 bits the sign falls on the exponent's last bit, where it doubles
128: it is subtracted together with that.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

THREADS = 4
"""Beside each other in a row, each with a word of it."""
PLAIN = plgpu.Layout.WGMMA


def ordered(x: Array, bits: int) -> Array:
    """The last axis as `widened` has its columns: numbers of a word that are half a word apart are neighbours."""
    half = 16 // bits
    parts = x.reshape(*x.shape[:-1], -1, THREADS, 2, half)
    return jnp.moveaxis(parts, -1, -3).reshape(x.shape)


def widened(ref: Any, *, by_hand: bool = True) -> Array:
    """Integers of shared memory [rows, columns] as bfloat16, columns `ordered`, for `wgmma` to take from registers.

    Not `by_hand` it is written in operations that the interpreter knows.
    """
    bits = 8 if ref.dtype == jnp.int8 else 4
    packed = plgpu.Layout.WGMMA_8BIT if bits == 8 else plgpu.Layout.WGMMA_UPCAST_4X
    values = plgpu.load(ref, layout=packed)
    if not by_hand:
        return ordered(values.astype(jnp.bfloat16), bits)
    shape = plgpu.ShapeDtypeStruct(ref.shape, jnp.bfloat16, layout=PLAIN)
    by_words = plgpu.inline_mgpu(arg_types=(packed,), return_type=shape)
    return by_words(lambda _, values: widened_words(values, bits))(values)


def widened_words(values: mgpu.FragmentedArray, bits: int) -> mgpu.FragmentedArray:
    """`widened` of what the threads have in their registers."""
    layout, pair = PLAIN.to_mgpu(), ir.VectorType.get((2,), ir.BF16Type.get())
    registers = np.empty(layout.registers_shape(values.shape), dtype=object)
    word = ir.IntegerType.get_signless(32)
    for (row, column, *rest), packed in np.ndenumerate(values.registers):
        whole = mgpu.utils.bitcast(packed, word)
        for j in range(16 // bits):
            part = arith.shrui(whole, arith.constant(word, j * bits)) if j else whole
            made = mgpu.utils.inline_ptx(PAIRS[bits], part, result_types=word)
            registers[row, column * (16 // bits) + j, *rest] = mgpu.utils.bitcast(made, pair)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def store_turned(x: Array, ref: Any, transforms: tuple, bits: int, *, by_hand: bool = True) -> None:
    """Stores bfloat16 [rows, columns] turned around, rows `ordered`: `ref` has [columns, rows], so `transforms` lay it.

    A thread has two columns of a row, and gives one of them for the other of the row that becomes its neighbour.
    """
    if not by_hand:
        ref.T[...] = ordered(x.T, bits).T
        return
    by_words = plgpu.inline_mgpu(arg_types=(PLAIN, plgpu.RefType(transforms)))
    swizzle = transforms[-1].swizzle

    def store(_, values: mgpu.FragmentedArray, ref: ir.Value) -> None:
        turned = mgpu.utils.memref_transpose(ref, (1, 0, 3, 2))
        # Four threads of a warp want the same bank, for a few words a thread.
        turned_words(values, bits).store_tiled(turned, swizzle, optimized=False)

    by_words(store)(x, ref)


def turned_words(values: mgpu.FragmentedArray, bits: int) -> mgpu.FragmentedArray:
    """Pairs of rows that become neighbours, of what the threads have in their registers."""
    layout, word = TURNED[bits], ir.IntegerType.get_signless(32)
    lane = arith.andi(mgpu.utils.thread_idx(), arith.constant(word, PARTNER[bits]))
    first = arith.cmpi(arith.CmpIPredicate.eq, lane, arith.constant(word, 0))
    choice = arith.select(first, arith.constant(word, 0x5410), arith.constant(word, 0x3276))
    registers = np.empty(values.registers.size, dtype=object)
    for at, pair in enumerate(values.registers.flat):
        own = mgpu.utils.bitcast(pair, word)
        both = mgpu.utils.prmt(own, mgpu.utils.shfl_bfly(own, PARTNER[bits]), choice)
        registers[at] = mgpu.utils.bitcast(both, pair.type)
    registers = registers.reshape(layout.registers_shape(values.shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


PARTNER = {4: 16, 8: 8}
"""How far away in a warp the thread is whose row becomes a neighbour."""
TURNED = {
    4: mgpu.TiledLayout(
        Tiling(((64, 8), (32, 8), (8, 8), (4, 8), (2, 2), (2, 1))),
        warp_dims=(-12, -8),
        lane_dims=(-3, -10, -5),
        vector_dim=-2,
    ),
    8: mgpu.TiledLayout(
        Tiling(((64, 8), (16, 8), (8, 8), (4, 8), (2, 2), (2, 1))),
        warp_dims=(-12,),
        lane_dims=(-6, -3, -10, -5),
        vector_dim=-2,
    ),
}
"""Where `turned_words` has its numbers: bits of rows from the highest, then those of warp, lane and register they are.

`wgmma` leaves row 64a + 16w + 8b + r in warp w, lane 4r + c, which has columns 2c and 2c + 1.
"""


MASK_AND_TURN = 0x6A
"""Of `lop3`: (a & b) ^ c."""
PAIRS = {
    4: f"""
    {{
    .reg .b32 turned, less;
    lop3.b32 turned, $1, 0x000F000F, 0x43084308, {MASK_AND_TURN:#x};
    mov.b32 less, 0x43084308;
    sub.bf16x2 $0, turned, less;
    }}
    """,
    8: f"""
    {{
    .reg .b32 low, sign;
    lop3.b32 low, $1, 0x007F007F, 0x43004300, {MASK_AND_TURN:#x};
    lop3.b32 sign, $1, 0x00800080, 0x43004300, {MASK_AND_TURN:#x};
    sub.bf16x2 $0, low, sign;
    }}
    """,
}
"""Two numbers of the lowest bits of a word's halves; 0x4300 is 128 in bfloat16, 0x4308 136."""
