"""What Hopper's registers hold after widening and turning: the instructions that are emitted, carried out by hand.

The interpreter knows no inline instructions, so kernels in it take the plain forms, `ordered` and `.T`. Here the words
of all 128 threads go through the emitted operations, and what comes out lies where the layouts say and equals the plain
forms.
"""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from maxstack.kernels import hopper_widen

THREADS, ROWS, COLUMNS = 128, 128, 64
ALL = 0xFFFFFFFF


def places(layout: mgpu.TiledLayout, shape: tuple[int, int]) -> np.ndarray:
    """[thread, register, number of the register]: the index of the element that it is, row · columns + column."""
    tiled = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        kept, cut = tiled.shape[: -len(tile)], tiled.shape[-len(tile) :]
        parts = tiled.reshape(*kept, *(x for n, t in zip(cut, tile, strict=True) for x in (n // t, t)))
        last = [len(kept) + 2 * i for i in range(len(tile))]
        tiled = parts.transpose(*range(len(kept)), *last, *(i + 1 for i in last))
    moved = [d for d in (*layout.warp_dims, *layout.lane_dims) if isinstance(d, int)]
    rest = [d for d in range(-tiled.ndim, 0) if d not in (*moved, layout.vector_dim)]
    vector = tiled.shape[layout.vector_dim]
    return tiled.transpose(*moved, *rest, layout.vector_dim).reshape(THREADS, -1, vector)


def run(
    emit, layout: mgpu.TiledLayout, kind: str, words: np.ndarray
) -> tuple[np.ndarray, mgpu.FragmentedArray]:
    """Words [thread, register] after the operations that `emit` makes of an array whose registers they are."""
    with mlir.make_ir_context() as context, ir.Location.unknown():
        mgpu.dialect.register_dialect(context)
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            number = ir.Type.parse(kind)
            each = ir.VectorType.get((32 // mgpu.utils.bitwidth(number),), number)
            made = func.FuncOp("emitted", ([each] * words.shape[1], []))
            block = made.add_entry_block()
        with ir.InsertionPoint(block):
            registers = np.array([*block.arguments, None], dtype=object)[:-1]
            shape = layout.registers_shape((ROWS, COLUMNS))
            signed = None if kind == "bf16" else True
            array = mgpu.FragmentedArray(
                _registers=registers.reshape(shape), _layout=layout, _is_signed=signed
            )
            result = emit(array)
        known = {argument: words[:, i] for i, argument in enumerate(block.arguments)}
        for op in block.operations:
            known |= carried_out(op.operation, known)
        return np.stack([known[register] for register in result.registers.flat], 1), result


def carried_out(op, known: dict) -> dict:  # noqa: C901  one case an operation
    """What one operation gives each thread."""
    given = [known[operand] for operand in op.operands]
    match op.name:
        case "arith.constant":
            found = np.full(THREADS, ir.IntegerAttr(op.attributes["value"]).value & ALL, np.uint32)
        case "gpu.thread_id":
            found = np.arange(THREADS, dtype=np.uint32) * ("<x>" in str(op.attributes["dimension"]))
        case "gpu.block_dim":
            found = np.full(THREADS, THREADS if "<x>" in str(op.attributes["dimension"]) else 1, np.uint32)
        case "arith.shrui":
            found = given[0] >> given[1]
        case "arith.andi":
            found = given[0] & given[1]
        case "arith.addi":
            found = given[0] + given[1]
        case "arith.muli":
            found = given[0] * given[1]
        case "arith.cmpi":
            assert ir.IntegerAttr(op.attributes["predicate"]).value == 0  # equal
            found = given[0] == given[1]
        case "arith.select":
            found = np.where(*given)
        case "nvvm.shfl.sync":
            assert "bfly" in str(op)
            found = given[1][np.arange(THREADS) ^ given[2]]
        case "llvm.inline_asm":
            found = instructions(ir.StringAttr(op.attributes["asm_string"]).value, given)
        case "vector.bitcast" | "vector.broadcast" | "vector.extract" | "arith.bitcast" | "arith.index_cast":
            found = given[0]
        case _:
            raise NotImplementedError(str(op))
    return {op.results[0]: found}


def instructions(text: str, given: list[np.ndarray]) -> np.ndarray:
    """PTX of a few kinds, by its meaning."""
    names = {f"${i + 1}": word for i, word in enumerate(given)}
    for name, operands in re.findall(r"^\s*([a-z][\w.]+) ([^;]+);", text, re.MULTILINE):
        to, *parts = (part.strip() for part in operands.split(","))
        values = [names[p] if p in names else np.full(THREADS, int(p, 0), np.uint32) for p in parts]
        match name:
            case "mov.b32":
                found = values[0]
            case "lop3.b32":
                table, found = int(parts[3], 0), np.zeros(THREADS, np.uint32)
                for bits in range(8):
                    if table >> bits & 1:
                        chosen = [v if bits >> 2 - i & 1 else ~v for i, v in enumerate(values[:3])]
                        found |= chosen[0] & chosen[1] & chosen[2]
            case "sub.bf16x2":
                halves = [v.astype(np.uint32).view(ml_dtypes.bfloat16).astype(np.float32) for v in values]
                found = (halves[0] - halves[1]).astype(ml_dtypes.bfloat16).view(np.uint32)
            case "prmt.b32":
                eight = values[0].astype(np.uint64) | values[1].astype(np.uint64) << np.uint64(32)
                found = np.zeros(THREADS, np.uint64)
                for i in range(4):
                    choice = (values[2].astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(0xF)
                    assert (choice < 8).all()
                    found |= ((eight >> (choice * np.uint64(8))) & np.uint64(0xFF)) << np.uint64(8 * i)
                found = found.astype(np.uint32)
            case _:
                raise NotImplementedError(name)
        names[to] = found
    return names["$0"]


def numbers(words: np.ndarray, layout: mgpu.TiledLayout) -> np.ndarray:
    """[rows, columns] of the bfloat16 pairs that the threads hold."""
    at = places(layout, (ROWS, COLUMNS))
    found = np.full(ROWS * COLUMNS, np.nan, np.float32)
    found[at] = words.astype(np.uint32).view(ml_dtypes.bfloat16).astype(np.float32).reshape(at.shape)
    return found.reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("bits", [4, 8])
def test_widened_words_are_the_numbers_in_order(bits):
    packed = (plgpu.Layout.WGMMA_8BIT if bits == 8 else plgpu.Layout.WGMMA_UPCAST_4X).to_mgpu()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = np.random.default_rng(0).integers(low, high, (ROWS, COLUMNS))
    held = values.reshape(-1)[places(packed, (ROWS, COLUMNS))]  # thread, register, number of the word
    words = sum((held[..., i] & (2**bits - 1)) << (bits * i) for i in range(32 // bits)).astype(np.uint32)
    words, made = run(lambda a: hopper_widen.widened_words(a, bits), packed, f"i{bits}", words)
    assert made.layout == plgpu.Layout.WGMMA.to_mgpu()
    np.testing.assert_array_equal(
        numbers(words, made.layout), hopper_widen.ordered(jnp.asarray(values), bits)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_turned_words_are_the_rows_in_order(bits):
    plain = plgpu.Layout.WGMMA.to_mgpu()
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(ml_dtypes.bfloat16)
    held = values.reshape(-1)[places(plain, (ROWS, COLUMNS))]
    words = np.ascontiguousarray(held).view(np.uint32)[..., 0]
    words, made = run(lambda a: hopper_widen.turned_words(a, bits), plain, "bf16", words)
    wanted = hopper_widen.ordered(jnp.asarray(values).T, bits).T
    np.testing.assert_array_equal(numbers(words, made.layout), np.asarray(wanted, np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_does_not_see_the_order(bits):
    a, b = np.random.default_rng(2).integers(-8, 8, (2, 5, 64))
    np.testing.assert_array_equal(
        hopper_widen.ordered(jnp.asarray(a), bits) @ hopper_widen.ordered(jnp.asarray(b), bits).T, a @ b.T
    )
