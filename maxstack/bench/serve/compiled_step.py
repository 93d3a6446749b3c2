"""What a decode step costs on a chip, as the compiler for that chip says, without the chip."""

import logging
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from maxstack.config import UserError
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import Chip as Peaks
from maxstack.serve.cost import Cost

log = logging.getLogger(__name__)

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
"""The smallest that libtpu describes; one chip of it is used."""
PAGE = 128
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
    begun, device = time.perf_counter(), _device(chip)
    single = [replace(stack, repeats=1) for stack in config.stacks]
    once = _count(replace(config, stacks=tuple(single)), device, rows, kv)
    total = list(once)
    for i, stack in enumerate(config.stacks):
        if stack.repeats > 1:
            doubled = [*single[:i], replace(single[i], pattern=stack.pattern * 2), *single[i + 1 :]]
            twice = _count(replace(config, stacks=tuple(doubled)), device, rows, kv)
            for what in range(len(total)):
                total[what] += (stack.repeats - 1) * (twice[what] - once[what])
    log.info("a decode step of %d rows compiled for %s in %.0f s", rows, chip, time.perf_counter() - begun)
    return Step(*total)


def _count(config: TransformerConfig, device: Any, rows: int, kv: Any) -> Step:
    """What the compiler says of a model as small as this."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding

    from maxstack.kernels.dispatch import chip_of, compiling_for
    from maxstack.models.generation.params import row_settings
    from maxstack.models.generation.weights import cast_products
    from maxstack.models.paged.pools import init_pools
    from maxstack.serve import programs
    from maxstack.serve.device import NEUTRAL
    from maxstack.serve.forms import scanned

    model = jax.eval_shape(lambda: cast_products(config.build(jax.random.key(0)), jnp.dtype(config.dtype)))
    leaves, treedef = jax.tree.flatten(model)
    form = scanned(treedef)
    pools = jax.eval_shape(partial(init_pools, config, PAGES, PAGE, kv))
    settings = row_settings([NEUTRAL], config.vocab_size)
    state = jax.eval_shape(lambda: programs.empty_rows(rows + 1, config.vocab_size, settings))
    shapes = ((rows,), (rows, PAGES), (rows,), ())
    steps = jax.eval_shape(lambda: programs.Steps(*(jnp.zeros(shape, jnp.int32) for shape in shapes)))

    def step(leaves, pools, state, steps):
        said, written = programs.decode_read(form, leaves, pools, state, steps)
        return said, *programs.decode_keep(form, pools, state, steps, said, written)

    where = NamedSharding(Mesh([device], ("x",)), jax.P())
    given = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        (leaves, pools, state, steps),
    )
    with compiling_for(chip_of(device)):
        traced = jax.jit(step, donate_argnums=(1, 2)).trace(*given)
        found = traced.lower(lowering_platforms=("tpu",)).compile().cost_analysis() or {}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return Step(found["flops"], weights)


def _device(chip: str) -> Any:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--simulate {chip} compiles for it, and the compiler is not here: pip install 'maxstack[aot]'"
        )
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]


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
