"""The warpgroup of a Hopper kernel that loads: stages of shared memory, filled in turn as they become free."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOADER_REGISTERS = 40


def load_stages(load, steps, stages: int, free, *, lend: bool = True) -> None:
    """`load(step, stage)` of each step, into a stage that is free. It lends its registers to those that multiply,
    unless all of them need few: a block that moves registers has all of a multiprocessor's."""
    if lend:
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def each(step, _):
        stage = jax.lax.rem(step, jnp.int32(stages))
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
        load(step, stage)

    def drain(step, _):  # no block ends before its last stages are given back
        plgpu.barrier_wait(free.at[jax.lax.rem(step, jnp.int32(stages))])

    jax.lax.fori_loop(0, steps, each, None)
    jax.lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)
