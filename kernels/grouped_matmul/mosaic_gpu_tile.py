"""What the Hopper kernels of grouped products share: stages that are summed, rows that are stored."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def summed(shape: tuple[int, int], multiply, steps, stages: int, ready, free) -> Array:
    """The sum of `multiply(acc, stage, step)` over all steps: a product is still under way when the next one begins."""

    def all_steps(acc):
        def each(step, _):
            stage = jax.lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])
            multiply(acc, stage, step)
            plgpu.wgmma_wait(1)  # the product before
            before = jax.lax.rem(step + stages - 1, jnp.int32(stages))
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[before]))

        jax.lax.fori_loop(0, steps, each, None)
        plgpu.wgmma_wait(0)
        last = jax.lax.rem(steps + stages - 1, jnp.int32(stages))
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[last]))
        return acc[...]

    return pl.run_scoped(all_steps, plgpu.ACC(shape, jnp.float32))


def store_rows(block, to, start, first, end) -> None:
    """Rows [first, end) of a block, which lie from `start` + `first` on: a run for each bit of how many they are, for
    TMA knows only runs whose length is fixed beforehand."""
    size, done, run = end - first, first, block.shape[0]
    while run:
        part = size & run

        @pl.when(part != 0)
        def _(done=done, run=run):
            plgpu.copy_smem_to_gmem(block.at[pl.ds(done, run)], to(pl.ds(start + done, run)))

        done, run = done + part, run // 2
