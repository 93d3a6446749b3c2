"""Rows for an H200 that is not there: what ptxas says of each kernel, and what its instructions allow on paper."""

from typing import Any

import kernel_mix as mix  # beside this file
from kernel_registers import kernel_resources
from kernel_shapes import (
    LATENT,
    SERVED,
    VALUES,
    Row,
    attention_of,
    grouped_of,
    latent_of,
    paged_of,
    quantized_of,
)

FEW = 64
"""Tokens up to which a product with packed weights is bound by memory."""


def attention(key: Row) -> list[Row]:
    """Each kernel of attention, forward and backward."""
    function, arguments = attention_of(key["model"], 8192, mask=key["mask"])
    found = kernel_resources(function, *arguments)
    return [{"kernel": each["kernel"], **key} | registers(each) | mix.peak(each) for each in found]


def paged(key: Row) -> list[Row]:
    """Attention over pages."""
    from tests.kernels.chips import HOPPER

    function, arguments, _, _ = paged_of(HOPPER, key["model"], key["pages"], int(key["queries"]))
    size, bits = SERVED[key["model"]][2], {"bfloat16": 16, "int8": 8, "int4": 4}[key["pages"]]
    # Values come in rows of 64; each key and each value of a token has a scale.
    token = 2 * size * bits / 8 + (0 if bits == 16 else 8)
    share = token / (size + -(-size // 64) * 64)
    return [
        key | registers(each) | both(each, share, int(key["queries"]) == 1)
        for each in kernel_resources(function, *arguments)
    ]


def latents(key: Row) -> list[Row]:
    """Attention over latents. Queries are the left operand: 64 rows, twice for each latent."""
    from tests.kernels.chips import HOPPER

    function, arguments, _, _ = latent_of(HOPPER, key["pages"], int(key["queries"]))
    found = kernel_resources(function, *arguments)
    columns = 64
    share = 2 * LATENT / (LATENT + VALUES)
    return [key | registers(each) | both(each, share, int(key["queries"]) == 1, columns) for each in found]


def quantized(key: Row) -> list[Row]:
    """A product with a packed weight."""
    exact = "×" in key["weights"]
    weights, tokens = key["weights"].split()[0], int(key["tokens"])
    function, arguments, _, _ = quantized_of(weights, tokens, key["model"], "int8" if exact else "float")
    found = kernel_resources(function, *arguments)
    return [key | registers(each) | both(each, weight_bytes(weights), tokens <= FEW) for each in found]


def grouped(key: Row) -> list[Row]:
    """Each kernel of products by expert, the largest of those of one name."""
    function, arguments, _, _ = grouped_of(key["weights"], int(key["rows"]), key["model"])
    found = sorted(kernel_resources(function, *arguments), key=lambda each: each["registers"])
    share, few = weight_bytes(key["weights"]), int(key["rows"]) <= FEW
    return list(
        {
            each["kernel"]: {"kernel": each["kernel"], **key} | registers(each) | both(each, share, few)
            for each in found
        }.values()
    )


def weight_bytes(weights: str) -> float:
    """Of one weight, with its part of a scale."""
    if weights == "bfloat16":
        return 2.0
    return 1.0 if weights == "int8" else 0.5 + 2 / int(weights.partition("-g")[2])


def registers(found: dict[str, Any]) -> Row:
    """Of `kernel_registers.kernel_resources`."""
    return {
        "registers": str(found["registers"]), "spilled bytes": str(found["spilled"]),
        "shared KiB": f"{found['shared'] / 1024:.1f}", "blocks an SM": str(mix.blocks_at_once(found)),
    }  # fmt: skip


def both(found: dict[str, Any], operand_bytes: float, streams: bool, columns: int | None = None) -> Row:
    """The share of the peak, or where memory bounds the kernel (`streams`) of the bandwidth; neither where so few turns
    are made that the compiler wrote them all out."""
    none = dict.fromkeys(("peak allowed", "B a turn", "clocks a turn", "bandwidth allowed"), "-")
    if not found["loops"]:
        return none
    if not streams:
        return none | {"peak allowed": mix.peak(found)["peak allowed"]}
    return none | mix.bandwidth(found, operand_bytes, columns)
