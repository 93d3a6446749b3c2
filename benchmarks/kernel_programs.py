"""The tables of docs/kernels.md: which kernels are compiled at which shapes for chips that are not there, and what the
compilers say of each.

Used by `kernel_table.py`, which writes the rows, and by the tests that compare with them. A table is a list of keys and
a function that compiles one key and returns its rows: add yours to `TABLES`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kernel_hopper as hopper  # beside this file
import kernel_tpu as tpu
from kernel_shapes import MASKS, MATRICES, MIXTURES, MODELS, WEIGHTS, Row

TPUS = ("v5e", "v5p", "v6e", "v7x")
CHIPS = ("H200", *TPUS)
PAGES = ("bfloat16", "int8", "int4")
SHOWN = ("1B", "8B", "70B")


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


TPU_COLUMNS = ("VMEM", "temporaries", "GFLOP", "MB moved")
HOPPER_COLUMNS = ("registers", "spilled", "shared")
INT8 = "int8 × int8"
TABLES: dict[str, Table] = {
    "tpu-attention": Table(
        product(chip=TPUS, model=("1B", "8B", "70B", "MLA", "256"), tokens=(2048, 8192)), tpu.attention,
        ("chip", "model", "tokens"), TPU_COLUMNS,
    ),
    "hopper-attention": Table(
        product(model=MODELS, mask=MASKS), hopper.attention, ("kernel", "model", "mask"), HOPPER_COLUMNS
    ),
    "tpu-paged": Table(
        product(chip=TPUS, model=SHOWN, pages=PAGES, queries=(1, 256)), tpu.paged,
        ("chip", "model", "pages", "queries"), TPU_COLUMNS,
    ),
    "hopper-paged": Table(
        [
            *product(model=SHOWN, pages=PAGES, queries=(1, 256)),
            *product(model=("96",), pages=("bfloat16", "int8"), queries=(1, 256)),
            *product(model=("256",), pages=PAGES, queries=(1, 256)),
        ],
        hopper.paged, ("model", "pages", "queries"), HOPPER_COLUMNS,
    ),
    "tpu-latents": Table(
        [
            *product(chip=TPUS, pages=PAGES, queries=(1,)),
            *product(chip=TPUS, pages=("bfloat16",), queries=(256,)),
        ],
        tpu.latents, ("chip", "pages", "queries"), TPU_COLUMNS,
    ),
    "hopper-latents": Table(
        product(pages=("bfloat16",), queries=(1, 256)), hopper.latents, ("pages", "queries"), HOPPER_COLUMNS
    ),
    "tpu-append": Table(
        [
            *product(chip=TPUS, model=("1B",), pages=("int8",), tokens=(1,)),
            *product(chip=TPUS, model=("8B",), pages=PAGES, tokens=(1, 512)),
            *product(chip=TPUS, model=("latents",), pages=("bfloat16",), tokens=(1, 512)),
        ],
        tpu.append, ("chip", "model", "pages", "tokens"), TPU_COLUMNS,
    ),
    "tpu-quantized": Table(
        [
            *product(chip=TPUS, model=("1B",), weights=("int8", "int4-g128"), tokens=(16, 4096)),
            *product(chip=TPUS, model=("8B", "70B"), weights=WEIGHTS, tokens=(16, 4096)),
            *product(chip=TPUS, model=MATRICES, weights=(INT8,), tokens=(4096,)),
        ],
        tpu.quantized, ("chip", "model", "weights", "tokens"), TPU_COLUMNS,
    ),
    "hopper-quantized": Table(
        [
            *product(model=("1B",), weights=("int8", "int4-g128"), tokens=(1, 64)),
            *product(model=("8B",), weights=WEIGHTS, tokens=(1, 16, 64, 512)),
            *product(model=("70B",), weights=WEIGHTS, tokens=(1, 64)),
            *product(model=MATRICES, weights=(INT8,), tokens=(16, 4096)),
        ],
        hopper.quantized, ("model", "weights", "tokens"), HOPPER_COLUMNS,
    ),
    "tpu-grouped": Table(
        [
            *product(chip=TPUS, model=MIXTURES, weights=("bfloat16",), rows=(65_536,)),
            *product(chip=TPUS, model=MIXTURES, weights=("int8", "int4-g128"), rows=(64, 4096)),
        ],
        tpu.grouped, ("chip", "model", "weights", "rows"), TPU_COLUMNS,
    ),
    "hopper-grouped": Table(
        [
            *product(model=MIXTURES, weights=("bfloat16",), rows=(65_536,)),
            *product(model=MIXTURES, weights=("int8", "int4-g128"), rows=(64, 4096)),
        ],
        hopper.grouped, ("kernel", "model", "weights", "rows"), HOPPER_COLUMNS,
    ),
    "cross-entropy": Table(
        [
            *product(chip=CHIPS, model=SHOWN, tokens=("all",)),
            *product(chip=CHIPS, model=("8B",), tokens=("weighed",)),
        ],
        tpu.cross_entropy, ("chip", "model", "tokens"), ("logits", *TPU_COLUMNS),
    ),
}  # fmt: skip


def measured(table: str, key: Row) -> list[Row]:
    """The rows of a key, with the package's sizes of blocks, not a user's."""
    from maxstack.kernels import tiles

    with tiles.trying({}):
        return TABLES[table].measure(key)
