"""The least time that each kernel can take on each chip, and beside it what its compiled programs are said to move."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kernel_shapes import (  # beside this file
    LENGTH,
    MATRICES,
    MIXTURES,
    SEQUENCES,
    Row,
    append_of,
    attention_work,
    cross_entropy_of,
    grouped_of,
    latent_of,
    paged_of,
    quantized_of,
)

PEAKS = {
    "H200": (989.4, 4800), "v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1640), "v7x": (2307, 7380),
}  # fmt: skip
"""bfloat16 TFLOP/s and GB/s of memory of a chip: nvidia.com/en-us/data-center/h200, cloud.google.com/tpu/docs."""
EXACT = {"H200": 1979, "v5e": 394, "v5p": 918, "v6e": 1836, "v7x": 2307}
"""int8 TOP/s (a v7x has none published: as many as of bfloat16)."""


@dataclass(frozen=True)
class Work:
    """What has to be computed and moved, whatever computes and moves it."""

    kernel: str
    shape: str
    flops: float
    bytes: float
    table: str = ""
    """Where what compiled programs for TPUs move is on record."""
    key: Row = field(default_factory=dict)
    int8: bool = False


def work() -> list[Work]:
    """All kernels, each at few shapes."""
    return [*_attention(), *_paged(), *_products(), *_grouped(), *_loss()]


def _attention() -> list[Work]:
    found = []
    for model, t in (("8B", 2048), ("8B", 8192), ("256", 8192)):
        forward, forward_bytes, backward, backward_bytes = attention_work(model, t)
        heads = "heads of 256" if model == "256" else model
        key = {"model": model, "tokens": str(t)}
        found += [
            Work("attention, forward", f"{heads}, {t:,} tokens", forward, forward_bytes),
            Work("attention, backward", f"{heads}, {t:,} tokens", backward, backward_bytes),
            Work(
                "attention, both", f"{heads}, {t:,} tokens", forward + backward, forward_bytes + backward_bytes,
                "tpu-attention", key,
            ),
        ]  # fmt: skip
    return found


def _paged() -> list[Work]:
    from maxstack.kernels.dispatch import Chip

    chip, found = Chip("tpu", "v6e"), []  # int4 as TPUs and Hopper hold it
    for pages in ("bfloat16", "int8", "int4"):
        _, _, flops, moved = paged_of(chip, "8B", pages, 1)
        key = {"model": "8B", "pages": pages, "queries": "1"}
        shape = f"8B, {SEQUENCES} sequences of {LENGTH:,}"
        found.append(Work(f"paged decode, {pages}", shape, flops, moved, "tpu-paged", key))
    _, _, flops, moved = paged_of(chip, "8B", "bfloat16", 256)
    key = {"model": "8B", "pages": "bfloat16", "queries": "256"}
    shape = f"8B, 4 chunks of 256 behind {LENGTH:,}"
    found.append(Work("paged chunk, bfloat16", shape, flops, moved, "tpu-paged", key))
    for pages in ("bfloat16", "int8"):
        _, _, flops, moved = latent_of(chip, pages, 1)
        shape, key = f"128 heads, {SEQUENCES} sequences of {LENGTH:,}", {"pages": pages, "queries": "1"}
        found.append(Work(f"latent decode, {pages}", shape, flops, moved, "tpu-latents", key))
    for pages, tokens in (("bfloat16", 1), ("int8", 1), ("int8", 512)):
        _, _, moved = append_of(chip, "8B", pages, tokens)
        key = {"model": "8B", "pages": pages, "tokens": str(tokens)}
        shape = f"8B, {SEQUENCES if tokens == 1 else 4} × {tokens} tokens"
        found.append(Work(f"append, {pages}", shape, 0, moved, "tpu-append", key))
    return found


def _products() -> list[Work]:
    found, (inputs, outputs) = [], MATRICES["70B"]
    for tokens in (1, 16, 4096):
        flops, around = 2.0 * tokens * inputs * outputs, 2 * tokens * (inputs + outputs)
        shape = f"{tokens:,} tokens, {inputs:,} to {outputs:,}"
        found.append(Work("matmul, bfloat16", shape, flops, 2 * inputs * outputs + around))
        for weights in ("int8", "int4-g128"):
            _, _, _, moved = quantized_of(weights, tokens, "70B")
            key = {"model": "70B", "weights": weights, "tokens": str(tokens)}
            found.append(Work(f"matmul, {weights}", shape, flops, moved, "tpu-quantized", key))
    key = {"model": "70B", "weights": "int8 × int8", "tokens": "4096"}
    _, _, flops, moved = quantized_of("int8", 4096, "70B")
    return [*found, Work("matmul, int8 × int8", shape, flops, moved, "tpu-quantized", key, int8=True)]


def _grouped() -> list[Work]:
    found = []
    for model, (experts, width, inner) in MIXTURES.items():
        for weights, rows in (("bfloat16", 65_536), ("int8", 64), ("int4-g128", 64)):
            _, _, flops, moved = grouped_of(weights, rows, model)
            what = " and gradients" if weights == "bfloat16" else ""
            shape = f"{model}, {rows:,} rows, {experts} × {width:,} to {inner:,}"
            key = {"model": model, "weights": weights, "rows": str(rows)}
            found.append(Work(f"grouped matmul{what}, {weights}", shape, flops, moved, "tpu-grouped", key))
    return found


def _loss() -> list[Work]:
    _, arguments, flops, moved = cross_entropy_of("8B", masked=False)
    (tokens, width), (_, vocabulary) = arguments[0].shape, arguments[1].shape
    shape, key = f"{tokens:,} tokens, {width:,} to {vocabulary:,}", {"model": "8B", "tokens": "all"}
    return [Work("cross-entropy and gradients", shape, flops, moved, "cross-entropy", key)]


def roofline(recorded: Callable[[str], list[Row]]) -> list[Row]:
    """The least time on each chip, what bounds it, products (p) or memory (m), and how many times the bytes that are
    needed the compiled program moves."""
    rows = []
    for one in work():
        row: Row = {
            "kernel": one.kernel,
            "shape": one.shape,
            "GFLOP": f"{one.flops / 1e9:,.1f}",
            "MB": f"{one.bytes / 1e6:,.1f}",
        }
        for chip, (tera, giga) in PEAKS.items():
            products = one.flops / (EXACT[chip] if one.int8 else tera) / 1e6
            memory = one.bytes / giga / 1e3
            row[f"{chip}, µs"] = f"{max(products, memory):,.0f} {'p' if products > memory else 'm'}"
        rows.append(row | {"moved on TPUs": _moved(one, recorded)})
    return rows


def _moved(one: Work, recorded: Callable[[str], list[Row]]) -> str:
    """Least and most of all TPUs, in times of what is needed; "-" where no program has only this kernel."""
    if not one.table:
        return "-"
    found = [
        float(row["MB moved"]) * 1e6 / one.bytes
        for row in recorded(one.table)
        if one.key.items() <= row.items() and row["chip"] != "H200"
    ]
    return f"{min(found):.2f}–{max(found):.2f} ×" if found else "-"
