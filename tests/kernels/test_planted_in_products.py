"""Faults planted in attention as XLA compiles it, in cross-entropy and in products, one at a time: the comparisons that
other tests rest on find each. (Attention over pages and on Hopper: test_planted_faults.py.)"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.kernels.attention import looped, unrolled
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.kernels.cross_entropy import xla as cross_entropy_xla
from maxstack.kernels.grouped_matmul import blocked, mosaic_tpu
from maxstack.kernels.quantized_matmul import mosaic_gpu as quantized_gpu
from maxstack.kernels.quantized_matmul import mosaic_tpu as quantized_tpu
from maxstack.kernels.quantized_matmul import xla as quantized_xla
from maxstack.sharding import MeshConfig
from tests.kernels import test_any_shape as shapes
from tests.kernels import test_grouped_matmul as grouped
from tests.kernels import test_grouped_matmul_chips as grouped_chips
from tests.kernels import test_quantized_matmul_chips as quantized_chips


class Other:
    """A module of which something is another's."""

    def __init__(self, module: Any, **others: Any):
        self.module, self.others = module, others

    def __getattr__(self, name: str) -> Any:
        return self.others[name] if name in self.others else getattr(self.module, name)


@pytest.mark.parametrize("driver", ["unrolled", "looped"])
def test_a_bound_of_attention_one_off_is_found(driver, monkeypatch):
    if driver == "unrolled":
        right = unrolled.static_range

        def short(*arguments: Any) -> tuple[int, int]:
            lo, hi = right(*arguments)
            return lo, max(hi - 1, lo)

        monkeypatch.setattr(unrolled, "static_range", short)
    else:
        right_blocks = looped.visible_blocks
        # One block of keys fewer where several are seen.
        monkeypatch.setattr(
            looped,
            "visible_blocks",
            lambda *a: (see := right_blocks(*a)) & (jnp.cumsum(see, 1) != 2),
        )
    check = shapes.test_attention_and_its_gradients_equal_brute_force.hypothesis.inner_test
    with jax.enable_x64(True), pytest.raises(AssertionError, match="Not equal"):
        check((19, 23), (4, 2), (4, 2), True, None, None, False, False, driver == "looped", 0)


def test_a_lost_merge_over_the_vocabulary_is_found(monkeypatch):
    """Of the devices' parts of the sum of exponentials the largest alone is kept."""
    random = np.random.default_rng(0)
    x, w, labels = random.normal(size=(8, 4)), random.normal(size=(4, 16)), random.integers(0, 16, 8)
    mesh = sharding.build_mesh(MeshConfig(data=4, fsdp=1, tensor=2), jax.devices()[:8])

    def on_mesh() -> float:
        with jax.set_mesh(mesh):
            cut = [
                jax.device_put(jnp.asarray(a, kind), jax.NamedSharding(mesh, spec))
                for a, kind, spec in (
                    (x, jnp.float32, jax.P("data")),
                    (w, jnp.float32, jax.P(None, "tensor")),
                    (labels, jnp.int32, jax.P("data")),
                )
            ]
            return float(jax.jit(lambda *a: cross_entropy(*a)[0])(*cut))

    wanted = shapes.nll_and_lse(x, w, labels, None)[0].sum()
    np.testing.assert_allclose(on_mesh(), wanted, rtol=1e-5)
    lax = Other(jax.lax, psum=lambda parts, axes: jax.lax.pmax(parts, axes))
    monkeypatch.setattr(cross_entropy_xla, "jax", Other(jax, lax=lax))
    assert abs(on_mesh() - wanted) > 0.1


@pytest.mark.parametrize("backend", ["xla", "mosaic_tpu"])
def test_scales_of_other_groups_are_found(backend, monkeypatch):
    x, w, meant = quantized_chips.case("int4-g32", False, 5, 128, 256)

    def product():
        if backend == "xla":
            return quantized_xla.by_loop(x, w)
        tiles = quantized_tpu.Tiles(16, 128, 128)
        return quantized_tpu.quantized_matmul(x, w, tiles=tiles, interpret=quantized_chips.CAREFUL)

    assert quantized_chips.largest_error(product(), meant) < 2**-8
    if backend == "xla":
        right = quantized_xla.outputs_of

        def swapped(w: Any, *arguments: Any) -> Any:
            part = right(w, *arguments)
            return dataclasses.replace(part, scale=part.scale[::-1])

        monkeypatch.setattr(quantized_xla, "outputs_of", swapped)
    else:
        scaled = quantized_tpu.scaled
        monkeypatch.setattr(quantized_tpu, "scaled", lambda values, scale: scaled(values, scale[::-1]))
    assert quantized_chips.largest_error(product(), meant) > 0.05


def test_a_missing_barrier_of_hopper_products_is_found(monkeypatch):
    """By the interpreter, which follows the phases of barriers."""
    x, w, _ = quantized_chips.case("int8", False, 5, 128, 640)
    plgpu = quantized_gpu.plgpu
    monkeypatch.setattr(quantized_gpu, "plgpu", Other(plgpu, barrier_wait=lambda barrier: None))
    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        pytest.raises(jax.errors.JaxRuntimeError, match="no threads observed phase"),
    ):
        jax.block_until_ready(quantized_gpu.quantized_matmul(x, w, splits=1, through_memory=True))


def test_a_bound_of_groups_one_off_is_found(monkeypatch):
    x, w, dy = grouped.drawn(41, 3)
    sizes = [7, 0, 30]
    right = blocked._over_groups

    def short(group: Any, carry: Any, group_sizes_e: Any, *arguments: Any) -> Any:
        return right(group, carry, group_sizes_e.at[0].add(-1), *arguments)

    monkeypatch.setattr(blocked, "_over_groups", short)
    y = blocked.rows(*grouped.as_jax(x, w, sizes, dy)[:3])
    assert np.abs(y - grouped.by_loop(x, w, sizes, dy)[0]).max() > 0.1


def test_a_bound_of_groups_one_off_on_tpus_is_found(monkeypatch):
    right = mosaic_tpu.of_rows

    def short(*arguments: Any) -> Any:
        visits = right(*arguments)
        return visits._replace(end_v=jnp.maximum(visits.end_v - 1, visits.first_v))

    monkeypatch.setattr(mosaic_tpu, "of_rows", short)
    x, w = grouped_chips.drawn(40, 128), grouped_chips.drawn(2, 128, 128, seed=1)
    tiles = mosaic_tpu.Tiles(32, 16, 128, 128)
    y = mosaic_tpu.rows(x, w, jnp.asarray([25, 15]), tiles=tiles, interpret=grouped_chips.CAREFUL)
    with pytest.raises(AssertionError, match="Not equal"):
        grouped_chips.assert_close(y, grouped_chips.by_loop(x, w, [25, 15]))
