"""The kernels at shapes of real models, compiled for chips that are not there, and what the compilers say of each.

Used by `kernel_table.py`, which writes its rows into docs/kernels.md, and by the tests that compare with them. A table
is a list of keys and a function that compiles one key and returns its row: add yours to `TABLES`.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernel_registers import kernel_resources  # beside this file

Row = dict[str, str]
"""Of a table, in words; those of the key first."""

MODELS = {
    "1B": (16, 8, 64, 64), "8B": (32, 8, 128, 128), "70B": (64, 8, 128, 128), "MLA": (16, 16, 192, 128),
    "96": (32, 32, 96, 96), "256": (16, 8, 256, 256),
}  # fmt: skip
"""Query heads, kv heads, head size of queries and keys, of values."""
SERVED = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128)}
"""Query heads, kv heads, head size of the models that decode."""
SEQUENCES, LENGTH, PAGE = 64, 8192, 128
WEIGHTS = ("int8", "int4-g128", "int4-g32")
MATRICES = {"8B": (4096, 14_336), "70B": (8192, 28_672)}
"""Inputs and outputs of the gate of a feed-forward layer."""
MIXTURES = {"Qwen3-30B-A3B": (128, 2048, 768), "Mixtral 8x7B": (8, 4096, 14_336)}
"""Experts, inputs and outputs of their gate."""
GROUPED_KERNELS = {"grouped_matmul": "rows", "grouped_matmul_matrices": "matrices"}
"""What the table calls them: products of rows with their expert's matrix, and the gradients of the matrices."""
TPUS = ("v5e", "v5p", "v6e", "v7x")
TPU_KERNELS = {
    "attention_forward": "forward",
    "attention_backward": "backward",
    "attention_backward_keys": "dk and dv",
    "attention_backward_queries": "dq",
}
"""What the table calls them; in a program is either `attention_backward` or the two below it."""
MASKS: dict[str, dict[str, Any]] = {
    "none": {"causal": False},
    "causal": {},
    "packed": {"packed": True},
    "packed, soft cap, sinks": {"packed": True, "softcap": 30.0, "sunk": True},
}


@dataclass(frozen=True)
class Table:
    """Rows of one kind."""

    keys: list[Row]
    """What the rows are of."""
    measure: Callable[[Row], list[Row]]
    """Compiles one key: a row, or one for each kernel inside of the program."""
    names: tuple[str, ...]
    """Columns that tell the rows apart."""
    compared: tuple[str, ...] = ()
    """How the columns begin in which more is worse."""


def product(**values: Any) -> list[Row]:
    """Keys of all combinations."""
    return [dict(zip(values, map(str, each), strict=True)) for each in itertools.product(*values.values())]


def on_chip_memory(program: Any, kernel: str) -> int:
    """Bytes of VMEM that a Mosaic TPU kernel of a compiled program takes; 0 if it is not in there."""
    for line in program.as_text().splitlines():
        if re.search(rf"[/(]{kernel}\)*/pallas_call", line) and "tpu_custom_call" in line:
            found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"', line)
            if found:
                return int(found[1])
    return 0


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size else "-"


def costs(program: Any, flops: float, moved: float) -> Row:
    """What a program states for XLA's schedule, beside what has to be computed and moved."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    row = {"temporaries MB": f"{memory.temp_size_in_bytes / 1e6:.1f}"}
    row |= {"GFLOP": f"{cost['flops'] / 1e9:.1f}"}
    row |= {"MB moved": f"{cost['bytes accessed'] / 1e6:.1f}"}
    row |= {
        "of them needed": f"{flops / max(cost['flops'], 1):.0%} / {moved / max(cost['bytes accessed'], 1):.0%}"
    }
    seconds = cost[
        "optimal_seconds"
    ]  # of some programs below 0: what the compiler does not know counts as -1 or so
    row |= {"compiler's µs": f"{seconds * 1e6:,.0f}" if seconds > 0 else "-"}
    return row | {"program KB": f"{memory.generated_code_size_in_bytes / 1e3:.0f}"}


# Attention.


def attention_of(
    model: str, length: int, *, mask: str = "causal", dtype: str = "bfloat16"
) -> tuple[Callable, list]:
    """Forward and backward of one row of `length` tokens, and its arguments: shapes."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.attention import attention

    n, k, h, w = MODELS[model]
    kind = MASKS[mask]

    def both(q, keys, v, out_gradient, sinks, ids):
        def run(q, keys, v):
            segments = ids if kind.get("packed") else None
            sunk = sinks if kind.get("sunk") else None
            options = {"causal": kind.get("causal", True), "softcap": kind.get("softcap")}
            return attention(q, keys, v, segment_ids=segments, sinks=sunk, **options)

        out, pull = jax.vjp(run, q, keys, v)
        return out, pull(out_gradient)

    heads = [(n, h), (k, h), (k, w), (n, w)]
    arguments = [jax.ShapeDtypeStruct((1, length, *each), jnp.dtype(dtype)) for each in heads]
    arguments += [jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)]
    return both, arguments


def attention_work(model: str, length: int) -> tuple[float, float, float, float]:
    """(FLOPs, bytes) of the forward pass and of the backward pass, causal, bfloat16: what no kernel can do without."""
    n, k, h, w = MODELS[model]
    pairs, read = n * length * (length + 1) / 2, 2 * length * (n * h + k * h + k * w)
    out = 2 * length * n * w
    # Backward: S again, dP, dV, dQ, dK; q, k, v, out and its gradient in, three gradients out.
    return 2 * pairs * (h + w), read + out, 2 * pairs * (3 * h + 2 * w), 2 * read + 2 * out


def tpu_attention(key: Row) -> list[Row]:
    """Attention on a TPU. Computed logits count whole blocks, also where a mask hides most of one."""
    from tests.kernels.chips import compiled_for

    model, length = key["model"], int(key["tokens"])
    function, arguments = attention_of(model, length)
    program = compiled_for(key["chip"], function, *arguments)
    forward, forward_bytes, backward, backward_bytes = attention_work(model, length)
    vmem = {f"VMEM MiB, {short}": mib(on_chip_memory(program, name)) for name, short in TPU_KERNELS.items()}
    return [key | vmem | costs(program, forward + backward, forward_bytes + backward_bytes)]


def hopper_attention(key: Row) -> list[Row]:
    """Attention on an H200: each of its kernels."""
    function, arguments = attention_of(key["model"], 8192, mask=key["mask"])
    found = kernel_resources(function, *arguments)
    return [{"kernel": each["kernel"], **key} | registers(each) | mix(each) for each in found]


# Attention over pages.


def paged_of(chip: Any, model: str, pages: str, queries: int) -> tuple[Callable, list, float, float]:
    """A serving step of one layer, its shapes, its FLOPs and the bytes that it has to move."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxstack.kernels.dispatch import compiling_for
    from maxstack.kernels.paged_attention import bytes_moved, init_cache, paged_attention

    n, k, h = SERVED[model]
    rows, entries = SEQUENCES if queries == 1 else 4, LENGTH // PAGE
    with compiling_for(chip):
        dtype: Any = pages
        cache = jax.eval_shape(lambda: init_cache(rows * entries, k, h, page=PAGE, dtype=dtype))
    q = (rows, n, h) if queries == 1 else (rows, queries, n, h)
    arguments = [
        jax.ShapeDtypeStruct(q, jnp.bfloat16), cache, jax.ShapeDtypeStruct((rows, entries), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]  # fmt: skip
    seen = LENGTH - (queries - 1) / 2  # of a query of the last ones, on average
    moved = bytes_moved(cache, np.full(rows, LENGTH), q)
    return lambda *each: paged_attention(*each), arguments, 4.0 * rows * queries * seen * n * h, moved


def tpu_paged(key: Row) -> list[Row]:
    """Attention over pages on a TPU; all sequences are full, so that every page of the pool is read."""
    from maxstack.kernels.dispatch import Chip
    from tests.kernels.chips import compiled_for

    of = paged_of(Chip("tpu", key["chip"]), key["model"], key["pages"], int(key["queries"]))
    function, arguments, flops, moved = of
    program = compiled_for(key["chip"], function, *arguments)
    vmem = {"VMEM MiB": mib(on_chip_memory(program, "paged_attention"))}
    return [key | vmem | costs(program, flops, moved)]


def hopper_paged(key: Row) -> list[Row]:
    """Attention over pages on an H200."""
    from tests.kernels.chips import HOPPER

    function, arguments, _, _ = paged_of(HOPPER, key["model"], key["pages"], int(key["queries"]))
    return [key | registers(found) | mix(found) for found in kernel_resources(function, *arguments)]


# Products with weights of 8 and 4 bits.


def quantized_of(weights: str, tokens: int, matrix: str) -> tuple[Callable, list, float, float]:
    """A product, its shapes, its FLOPs and the bytes that it has to move."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.quantized_matmul import QuantizedWeight, quantized_matmul

    inputs, outputs = MATRICES[matrix]
    group = inputs if weights == "int8" else int(weights.partition("-g")[2])
    values, scale = (jnp.int8, jnp.float32) if weights == "int8" else (jnp.int4, jnp.bfloat16)
    w = QuantizedWeight(
        values=jax.ShapeDtypeStruct((outputs, inputs), values), inputs=inputs, group=group, zero=None,
        scale=jax.ShapeDtypeStruct((inputs // group, outputs), scale),
    )  # fmt: skip
    moved = (
        inputs * outputs * w.bits / 8
        + w.scale.size * w.scale.dtype.itemsize
        + 2 * tokens * (inputs + outputs)
    )
    x = jax.ShapeDtypeStruct((tokens, inputs), jnp.bfloat16)
    return lambda x, w: quantized_matmul(x, w), [x, w], 2.0 * tokens * inputs * outputs, moved


def tpu_quantized(key: Row) -> list[Row]:
    """A product with a packed weight on a TPU."""
    from tests.kernels.chips import compiled_for

    function, arguments, flops, moved = quantized_of(key["weights"], int(key["tokens"]), key["model"])
    program = compiled_for(key["chip"], function, *arguments)
    vmem = {"VMEM MiB": mib(on_chip_memory(program, "quantized_matmul"))}
    return [key | vmem | costs(program, flops, moved)]


def hopper_quantized(key: Row) -> list[Row]:
    """A product with a packed weight on an H200."""
    function, arguments, _, _ = quantized_of(key["weights"], int(key["tokens"]), key["model"])
    return [key | registers(found) | mix(found) for found in kernel_resources(function, *arguments)]


# Products by expert.


def grouped_of(weights: str, rows: int, model: str) -> tuple[Callable, list, float, float]:
    """Rows times their expert's gate, in bfloat16 with both gradients; shapes, FLOPs, and the bytes that have to be
    moved where every expert has rows."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.grouped_matmul import grouped_matmul
    from maxstack.kernels.quantized_matmul import quantize

    experts, inputs, outputs = MIXTURES[model]
    x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (inputs, outputs))
    sizes, flops = jax.ShapeDtypeStruct((experts,), jnp.int32), 2.0 * rows * inputs * outputs
    in_and_out = 2 * rows * (inputs + outputs)
    if weights == "bfloat16":
        w = jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.bfloat16)

        def both(x, w, sizes, dy):
            y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
            return y, *pull(dy)

        return both, [x, w, sizes, dy], 3 * flops, 3 * (in_and_out + 2 * experts * inputs * outputs)
    kind: Any = weights
    one = jax.eval_shape(
        lambda w: quantize(w, kind, storage="int4"), jax.ShapeDtypeStruct((outputs, inputs), jnp.float32)
    )
    w = jax.tree.map(lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype), one)
    packed = experts * (inputs * outputs * one.bits / 8 + one.scale.size * one.scale.dtype.itemsize)
    return lambda x, w, sizes: grouped_matmul(x, w, sizes), [x, w, sizes], flops, in_and_out + packed


def tpu_grouped(key: Row) -> list[Row]:
    """Products by expert on a TPU; tiles at the borders of experts are computed for each of the two."""
    from tests.kernels.chips import compiled_for

    function, arguments, flops, moved = grouped_of(key["weights"], int(key["rows"]), key["model"])
    program = compiled_for(key["chip"], function, *arguments)
    vmem = {
        f"VMEM MiB, {short}": mib(on_chip_memory(program, name)) for name, short in GROUPED_KERNELS.items()
    }
    return [key | vmem | costs(program, flops, moved)]


def hopper_grouped(key: Row) -> list[Row]:
    """Products by expert on an H200: each of the kernels, the largest of those of one name."""
    function, arguments, _, _ = grouped_of(key["weights"], int(key["rows"]), key["model"])
    found = sorted(kernel_resources(function, *arguments), key=lambda each: each["registers"])
    rows = {each["kernel"]: {"kernel": each["kernel"], **key} | registers(each) | mix(each) for each in found}
    return list(rows.values())


# What ptxas says, and what the instructions of a Hopper kernel allow.


def registers(found: dict[str, Any]) -> Row:
    """Of `kernel_registers.kernel_resources`."""
    return {
        "registers": str(found["registers"]), "spilled bytes": str(found["spilled"]),
        "shared KiB": f"{found['shared'] / 1024:.1f}",
    }  # fmt: skip


FLOPS_A_CLOCK = 4096
"""bfloat16, dense, of one multiprocessor: 989.4 TFLOP/s of 132 at 1.83 GHz (NVIDIA H100 architecture whitepaper)."""
LANES_A_CLOCK = {"exp": 16, "other": 64, "float": 128}
"""Results a clock of one multiprocessor of compute capability 9.0: exp2, log2 and reciprocal root; comparisons, choices
and conversions; float32 additions, multiplications and both at once (CUDA C++ Programming Guide, throughput of native
arithmetic instructions)."""


def mix(found: dict[str, Any]) -> Row:
    """The share of the tensor cores' peak that a kernel's instructions allow, counted in its PTX, where each loop's
    body stands once: the shorter of the two (all units at once / one after another) is what no overlap would give."""
    count = found["instructions"]
    tensor = count["wgmma flops"] / FLOPS_A_CLOCK
    units = {name: 128 * count[name] / lanes for name, lanes in LANES_A_CLOCK.items()}
    if not tensor:
        return {"exp2 clocks a tensor clock": "-", "peak allowed": "-"}
    together = tensor / max(tensor, units["exp"], units["other"] + units["float"])
    apart = tensor / (tensor + sum(units.values()))
    return {
        "exp2 clocks a tensor clock": f"{units['exp'] / tensor:.2f}",
        "peak allowed": f"{together:.0%} / {apart:.0%}",
    }


# Their tables.

TPU_COLUMNS = ("VMEM", "temporaries", "GFLOP", "MB moved")
HOPPER_COLUMNS = ("registers", "spilled", "shared")
TABLES: dict[str, Table] = {
    "tpu-attention": Table(
        product(chip=TPUS, model=("1B", "8B", "70B", "MLA", "256"), tokens=(2048, 8192)), tpu_attention,
        ("chip", "model", "tokens"), TPU_COLUMNS,
    ),
    "hopper-attention": Table(
        product(model=MODELS, mask=MASKS), hopper_attention, ("kernel", "model", "mask"), HOPPER_COLUMNS
    ),
    "tpu-paged": Table(
        product(chip=TPUS, model=SERVED, pages=("bfloat16", "int8", "int4"), queries=(1, 256)), tpu_paged,
        ("chip", "model", "pages", "queries"), TPU_COLUMNS,
    ),
    "hopper-paged": Table(
        product(model=SERVED, pages=("bfloat16", "int8", "int4"), queries=(1, 256)), hopper_paged,
        ("model", "pages", "queries"), HOPPER_COLUMNS,
    ),
    "tpu-quantized": Table(
        product(chip=TPUS, model=MATRICES, weights=WEIGHTS, tokens=(16, 4096)), tpu_quantized,
        ("chip", "model", "weights", "tokens"), TPU_COLUMNS,
    ),
    "hopper-quantized": Table(
        product(model=MATRICES, weights=WEIGHTS, tokens=(1, 64, 512)), hopper_quantized,
        ("model", "weights", "tokens"), HOPPER_COLUMNS,
    ),
    "tpu-grouped": Table(
        [
            *product(chip=TPUS, model=MIXTURES, weights=("bfloat16",), rows=(65_536,)),
            *product(chip=TPUS, model=MIXTURES, weights=("int8", "int4-g128"), rows=(64, 4096)),
        ],
        tpu_grouped, ("chip", "model", "weights", "rows"), TPU_COLUMNS,
    ),
    "hopper-grouped": Table(
        [
            *product(model=MIXTURES, weights=("bfloat16",), rows=(65_536,)),
            *product(model=MIXTURES, weights=("int8", "int4-g128"), rows=(64, 4096)),
        ],
        hopper_grouped, ("kernel", "model", "weights", "rows"), HOPPER_COLUMNS,
    ),
}  # fmt: skip


def measured(table: str, key: Row) -> list[Row]:
    """The rows of a key, with the package's sizes of blocks, not a user's."""
    from maxstack.kernels import tiles

    with tiles.trying({}):
        return TABLES[table].measure(key)
