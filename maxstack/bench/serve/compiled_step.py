"""What a decode step costs on a chip, as the compiler for that chip says, without the chip."""

import logging
import time
from dataclasses import replace
from typing import Any, NamedTuple

from maxstack.bench.serve.absent_chip import PAGE, Setting, made
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import Chip as Peaks
from maxstack.serve.cost import Cost

log = logging.getLogger(__name__)

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
"""The smallest that libtpu describes; one chip of it is used."""
PAGES = 8
"""Of each row, in the step that is compiled: the cache's share is taken out again."""


class Step(NamedTuple):
    """A decode step of all rows, each with `PAGES` pages."""

    flops: float
    """By the compiler's count."""
    weight_bytes: int | float
    """Of the weights as the step takes them, each read once. The compiler's own count of bytes is of no use here: it
    has those that move between the memories inside the chip as well, and all of a pool that is written in place."""


def compiled_step(config: TransformerConfig, chip: str, rows: int, kv: Any) -> Step:
    """Compile it by libtpu. Raises UserError where that is not installed.

    The compiler's count has the body of a loop once, however often it runs. So what is compiled has one repeat of each
    stack of layers, and then, stack by stack, two: their difference is what a repeat costs.
    """
    begun = time.perf_counter()
    single = [replace(stack, repeats=1) for stack in config.stacks]
    once = _count(replace(config, stacks=tuple(single)), chip, rows, kv)
    total = list(once)
    for i, stack in enumerate(config.stacks):
        if stack.repeats > 1:
            doubled = [*single[:i], replace(single[i], pattern=stack.pattern * 2), *single[i + 1 :]]
            twice = _count(replace(config, stacks=tuple(doubled)), chip, rows, kv)
            for what in range(len(total)):
                total[what] += (stack.repeats - 1) * (twice[what] - once[what])
    log.info("a decode step of %d rows compiled for %s in %.0f s", rows, chip, time.perf_counter() - begun)
    return Step(*total)


def _count(config: TransformerConfig, chip: str, rows: int, kv: Any) -> Step:
    """What the compiler says of a model as small as this."""
    step = made(
        Setting(
            config=config, topology=TOPOLOGIES[chip], chips=1, rows=rows, width=PAGES, pages=PAGES, kv=kv
        )
    )  # fmt: skip
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in step.leaves)
    return Step((step.compiled.cost_analysis() or {})["flops"], weights)


def cost_of(
    step: Step, config_cost: Cost, peaks: Peaks, rows: int, *, of_bandwidth: float, of_products: float
) -> Cost:
    """The step's products, split into what a token and a pair of tokens costs, and its weights.

    `config_cost` says what the cache takes a token and attention a pair: that of the rows' pages is taken out.
    """
    pairs = rows * PAGES * PAGE
    flops = (step.flops - pairs * config_cost.attention_flops_a_pair) / rows
    return Cost(
        weight_bytes=step.weight_bytes,
        kv_bytes_a_token=config_cost.kv_bytes_a_token,
        flops_a_token=flops,
        attention_flops_a_pair=config_cost.attention_flops_a_pair,
        bytes_a_second=peaks.bytes_a_second * of_bandwidth,
        flops_a_second=peaks.flops_a_second * of_products,
    )
