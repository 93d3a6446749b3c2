"""What a decode step costs on a chip, as the compiler for that chip says, without the chip."""

import logging
import os
from functools import partial
from typing import Any, NamedTuple

from maxstack.config import UserError
from maxstack.models.transformer import TransformerConfig
from maxstack.serve.cost import Chip as Peaks
from maxstack.serve.cost import Cost
from maxstack.serve.plan import Limits

log = logging.getLogger(__name__)

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
"""The smallest that libtpu describes; one chip of it is used."""
PAGES = 8
"""Of each row, in the step that is compiled: the cache's share is taken out again."""


class Step(NamedTuple):
    """A decode step of all rows, each with `PAGES` pages."""

    bytes: float
    """Read and written, weights and cache included."""
    flops: float
    weight_bytes: int
    seconds_to_compile: float


def compiled_step(config: TransformerConfig, chip: str, limits: Limits, kv: Any) -> Step:
    """Compile it by libtpu. Raises UserError where that is not installed."""
    import time

    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    from maxstack.kernels.dispatch import chip_of, compiling_for
    from maxstack.models.generation.params import row_settings
    from maxstack.models.generation.weights import cast_products
    from maxstack.models.paged.pools import init_pools
    from maxstack.serve import programs
    from maxstack.serve.device import NEUTRAL
    from maxstack.serve.forms import scanned

    begun, device, rows = time.perf_counter(), _device(chip), limits.rows
    model = jax.eval_shape(lambda: cast_products(config.build(jax.random.key(0)), np.dtype(config.dtype)))
    leaves, treedef = jax.tree.flatten(model)
    form = scanned(treedef)
    pools = jax.eval_shape(partial(init_pools, config, limits.pages, limits.page, kv))
    settings = row_settings([NEUTRAL], config.vocab_size)
    state = jax.eval_shape(lambda: programs.empty_rows(rows + 1, config.vocab_size, settings))
    shapes = ((rows,), (rows, PAGES), (rows,), ())
    steps = programs.Steps(*(jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes))

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
        found = traced.lower(lowering_platforms=("tpu",)).compile().cost_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    took = time.perf_counter() - begun
    log.info("decode step of %d rows compiled for %s in %.0f s", rows, chip, took)
    return Step(found["bytes accessed"], found["flops"], weights, took)


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
    step: Step, config_cost: Cost, peaks: Peaks, limits: Limits, *, of_bandwidth: float, of_products: float
) -> Cost:
    """The step's bytes and products, split into what each step, token, and pair of tokens costs.

    `config_cost` says what the cache takes a token and attention a pair: those are taken out of the step, whose rows
    had full pages; the rest is what every step reads, and what each of its rows computes.
    """
    cached = limits.rows * PAGES * limits.page
    fixed = step.bytes - cached * config_cost.kv_bytes_a_token
    flops = (step.flops - cached * config_cost.attention_flops_a_pair) / limits.rows
    return Cost(
        weight_bytes=fixed,
        kv_bytes_a_token=config_cost.kv_bytes_a_token,
        flops_a_token=max(flops, 0.0) or config_cost.flops_a_token,
        attention_flops_a_pair=config_cost.attention_flops_a_pair,
        bytes_a_second=peaks.bytes_a_second * of_bandwidth,
        flops_a_second=peaks.flops_a_second * of_products,
    )
