"""What the compilers of absent chips say of the kernels; writes the tables of docs/kernels.md.

    python benchmarks/kernel_table.py                      # all tables
    python benchmarks/kernel_table.py tpu-attention --chips v5e,v6e --lengths 2048 --check

`--check` writes nothing, and fails where a kernel takes a tenth more on-chip memory than the table says.
A table is a function that returns rows (dicts with the same keys); add yours to `TABLES`.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
Row = dict[str, Any]

MODELS = {
    "1B": (16, 8, 64, 64), "8B": (32, 8, 128, 128), "70B": (64, 8, 128, 128), "MLA": (16, 16, 192, 128),
    "256": (16, 8, 256, 256),
}  # fmt: skip
"""Query heads, kv heads, head size of queries and keys, of values."""
TPUS = ("v5e", "v5p", "v6e", "v7x")
KERNELS = {
    "attention_forward": "forward",
    "attention_backward": "backward",
    "attention_backward_keys": "dk and dv",
    "attention_backward_queries": "dq",
}
"""What the table calls them; in a program is either `attention_backward` or the two below it."""


def on_chip_memory(text: str, kernel: str) -> int:
    """Bytes of VMEM that a Mosaic TPU kernel of a compiled program takes; 0 if it is not in there."""
    for line in text.splitlines():
        if re.search(rf"[/(]{kernel}\)*/pallas_call", line) and "tpu_custom_call" in line:
            found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"', line)
            if found:
                return int(found[1])
    return 0


def attention_program(chip: str, model: str, length: int, *, packed: bool, backward: bool) -> Any:
    """One row of `length` tokens, bfloat16, causal, compiled for a TPU: forward, or forward and backward."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.attention import attention
    from tests.kernels.chips import compiled_for, shapes

    n, k, h, w = MODELS[model]

    def forward(q, k, v, dout, *segments):
        return attention(q, k, v, implementation="mosaic_tpu", segment_ids=segments[0] if packed else None)

    def both(q, k, v, dout, *segments):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, dout, *segments), q, k, v)
        return out, pull(dout)

    sizes = [((1, length, *last), jnp.bfloat16) for last in ((n, h), (k, h), (k, w), (n, w))]
    ids = [((1, length), jnp.int32)] if packed else []
    return compiled_for(chip, both if backward else forward, *shapes(*sizes, *ids))


def tpu_attention(chips: list[str], lengths: list[int], models: list[str]) -> list[Row]:
    """Attention on TPUs. Computed logits count whole blocks, also where a mask hides most of one."""
    rows = []
    for chip in chips:
        for model in models:
            for length in lengths:
                program = attention_program(chip, model, length, packed=False, backward=True)
                text, cost, memory = program.as_text(), program.cost_analysis(), program.memory_analysis()
                n, _, h, w = MODELS[model]
                needed = 2 * n * (length * (length + 1) / 2) * (4 * h + 3 * w)  # of seven products a logit
                vmem = {short: on_chip_memory(text, name) / 2**20 for name, short in KERNELS.items()}
                rows.append(
                    {"chip": chip, "model": model, "tokens": length}
                    | {f"VMEM MiB, {short}": f"{size:.1f}" if size else "-" for short, size in vmem.items()}
                    | {
                        "temporaries MB": f"{memory.temp_size_in_bytes / 1e6:.0f}",
                        "GFLOP": f"{cost['flops'] / 1e9:.0f}",
                        "of them visible": f"{needed / cost['flops']:.0%}",
                        "MB moved": f"{cost['bytes accessed'] / 1e6:.0f}",
                        "program KB": f"{memory.generated_code_size_in_bytes / 1e3:.0f}",
                    }
                )
                print(rows[-1], flush=True)
    return rows


PEAKS = {
    "H200": (989.4, 4800), "v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1640), "v7x": (2307, 7380),
}  # fmt: skip
"""bfloat16 TFLOP/s and GB/s of memory of a chip: nvidia.com/en-us/data-center/h200, cloud.google.com/tpu/docs."""


def work() -> list[tuple[str, str, float, float]]:
    """(kernel, shape, FLOPs, bytes) that have to be computed and moved, whatever computes and moves them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxstack.kernels.paged_attention import bytes_moved, init_cache
    from maxstack.kernels.quantized_matmul import quantize

    n, k, h, w = MODELS["8B"]
    found: list[tuple[str, str, float, float]] = []
    for t in (2048, 8192):
        pairs, read = n * t * (t + 1) / 2, 2 * t * (n * h + k * h + k * w)
        out = 2 * t * n * w
        found.append(("attention, forward", f"8B, {t:,} tokens", 2 * pairs * (h + w), read + out))
        # S again, dP, dV, dQ, dK; q, k, v, out and its gradient in, three gradients out.
        found.append(
            ("attention, backward", f"8B, {t:,} tokens", 2 * pairs * (3 * h + 2 * w), 2 * read + 2 * out)
        )
    sequences, length, page = 64, 8192, 128
    dtypes: tuple[Any, ...] = ("bfloat16", "int8", "int4")
    kinds: tuple[Any, ...] = ("int8", "int4-g128")
    for dtype in dtypes:
        cache = jax.eval_shape(
            lambda d=dtype: init_cache(sequences * length // page, k, h, page=page, dtype=d)
        )
        moved = bytes_moved(cache, np.full(sequences, length), (sequences, n, h))
        shape = f"8B, {sequences} sequences of {length:,}"
        found.append((f"paged decode, {dtype}", shape, 4.0 * sequences * length * n * h, moved))
    inputs, outputs = 8192, 28_672
    for tokens in (1, 64, 4096):
        flops, activations = 2.0 * tokens * inputs * outputs, 2 * tokens * (inputs + outputs)
        shape = f"{tokens:,} tokens, {inputs:,} to {outputs:,}"
        found.append(("matmul, bfloat16", shape, flops, 2 * inputs * outputs + activations))
        for kind in kinds:
            weight = jax.ShapeDtypeStruct((outputs, inputs), jnp.bfloat16)
            scale = jax.eval_shape(lambda x, kind=kind: quantize(x, kind), weight).scale
            values = inputs * outputs * (1.0 if kind == "int8" else 0.5)
            packed = values + scale.size * scale.dtype.itemsize
            found.append((f"matmul, {kind}", shape, flops, packed + activations))
    tokens, width, vocabulary = 8192, 4096, 152_064
    moved = 2 * (2 * tokens * width + 2 * width * vocabulary)
    shape = f"{tokens:,} tokens, {width:,} to {vocabulary:,}"
    found.append(("cross-entropy and gradients", shape, 6.0 * tokens * width * vocabulary, moved))
    return found


def roofline(*_: Any) -> list[Row]:
    """The least time that each kernel can take on a chip, and what bounds it: products (p) or memory (m)."""
    rows = []
    for kernel, shape, flops, moved in work():
        row: Row = {
            "kernel": kernel,
            "shape": shape,
            "GFLOP": f"{flops / 1e9:,.1f}",
            "MB": f"{moved / 1e6:,.1f}",
        }
        for chip, (tera, giga) in PEAKS.items():
            products, memory = flops / tera / 1e6, moved / giga / 1e3
            row[f"{chip}, µs"] = f"{max(products, memory):,.0f} {'p' if products > memory else 'm'}"
        rows.append(row)
    return rows


TABLES: dict[str, Callable[[list[str], list[int], list[str]], list[Row]]] = {
    "tpu-attention": tpu_attention,
    "roofline": roofline,
}


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in rows])


def put(name: str, text: str) -> None:
    """Write a table between its marks on the page, which are put at the end if they are not there."""
    page = PAGE.read_text() if PAGE.exists() else "# Kernels\n"
    start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    if start not in page:
        page += f"\n## {name}\n\n{start}\n{end}\n"
    before, _, rest = page.partition(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def recorded(name: str) -> list[Row]:
    """Rows of a table on the page."""
    part = PAGE.read_text().partition(f"<!-- table {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.strip().splitlines()
    ]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def grown(name: str, rows: list[Row], tolerance: float = 0.1) -> list[str]:
    """What takes more on-chip memory than the page says."""
    key = ("chip", "model", "tokens")
    known = {tuple(str(row[part]) for part in key): row for row in recorded(name)}
    pairs = ((row, known.get(tuple(str(row[part]) for part in key), {})) for row in rows)
    return [
        f"{[row[part] for part in key]}: {column} {old[column]} -> {row[column]}"
        for row, old in pairs
        for column in row
        if column.startswith("VMEM")
        and number(row[column]) > number(old.get(column, "inf")) * (1 + tolerance)
    ]


def number(cell: str) -> float:
    """A cell of memory; a kernel that is not in a program takes none."""
    return 0.0 if cell == "-" else float(cell)


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--chips", default=",".join(TPUS))
    parser.add_argument("--lengths", default="2048,8192", help="tokens a row")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--check", action="store_true", help="compare with the page and write nothing")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    worse = []
    for name in args.tables:
        lengths = [int(length) for length in args.lengths.split(",")]
        rows = TABLES[name](args.chips.split(","), lengths, args.models.split(","))
        if args.check:
            worse += grown(name, rows)
        else:
            put(name, table(rows))
    print("\n".join(worse))
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
