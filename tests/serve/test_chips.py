"""The step programs, compiled for accelerators that are not there: they run the paged kernels and copy no pool."""

import re
from functools import partial

import jax
import numpy as np
import pytest

from maxstack.models import llama
from maxstack.models.generation.params import row_settings
from maxstack.models.generation.weights import cast_products
from maxstack.models.paged.pools import init_pools
from maxstack.serve import programs
from maxstack.serve.device import NEUTRAL
from maxstack.serve.forms import scanned
from maxstack.serve.programs import Steps, empty_rows
from tests.kernels.chips import compiled_for, needs_cuda_compiler, needs_libtpu

CONFIG = llama(
    vocab_size=1024,
    width=512,
    depth=3,
    heads=4,
    kv_heads=2,
    head_size=128,
    feed_forward=1024,
    dtype="bfloat16",
)
ROWS, PAGES, PAGE = 8, 96, 128


def compiled_step(chip: str, kind: str) -> str:
    """The text of a decode step of all rows."""
    model = jax.eval_shape(lambda: cast_products(CONFIG.build(jax.random.key(0)), np.dtype("bfloat16")))
    leaves, treedef = jax.tree.flatten(model)
    form = scanned(treedef)
    pools = jax.eval_shape(partial(init_pools, CONFIG, PAGES, PAGE, kind))
    state = jax.eval_shape(
        lambda: empty_rows(ROWS + 1, CONFIG.vocab_size, row_settings([NEUTRAL], CONFIG.vocab_size))
    )
    steps = jax.eval_shape(
        lambda: Steps(*(np.zeros(shape, np.int32) for shape in ((ROWS,), (ROWS, 16), (ROWS,), ())))
    )

    def step(leaves, pools, state, steps):
        said, written = programs.decode_read(form, leaves, pools, state, steps)
        return said, *programs.decode_keep(form, pools, state, steps, said, written)

    return compiled_for(chip, step, leaves, pools, state, steps, donate_argnums=(1, 2)).as_text() or ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["bfloat16", "int8"],
)
@pytest.mark.parametrize(
    "chip",
    [
        pytest.param("v5e", marks=needs_libtpu),
        pytest.param("v6e", marks=needs_libtpu),
        pytest.param("h200", marks=needs_cuda_compiler),
    ],
)
def test_a_decode_step_runs_the_kernel_and_copies_no_pool(chip, kind):
    text = compiled_step(chip, kind)
    assert ("mosaic_gpu" if chip == "h200" else "tpu_custom_call") in text
    pool = f"[{3 * PAGES},2,{PAGE},128]"
    assert pool in text
    copies = [line for line in re.findall(r"= \S+ (?:copy|copy-start|transpose)\(.*", text) if pool in line]
    copies += re.findall(rf"= \w+{re.escape(pool)}\S* (?:copy|copy-start|transpose)\(.*", text)
    assert not copies
