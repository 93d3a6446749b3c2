"""Faults planted in kernels, one at a time: the comparisons with float64 and the race detectors that other tests rest
on find each. Without the fault the same call passes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.attention import mosaic_gpu_spans
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import mosaic_gpu, mosaic_tpu, plan
from tests.kernels.hopper_interpreter import interpreted, races_in
from tests.kernels.paged import brute_force, paged, queries
from tests.kernels.test_attention_hopper import compare

CAREFUL = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
LENGTHS = (300, 130)
SPLITS = 2


class Other:
    """A module of which something is another's."""

    def __init__(self, module: Any, **others: Any):
        self.module, self.others = module, others

    def __getattr__(self, name: str) -> Any:
        return self.others[name] if name in self.others else getattr(self.module, name)


def difference(kernel: str, **made: Any) -> float:
    """Of a kernel of attention over pages from float64, in two splits of int8 pages; races count as infinite."""
    made_paged = paged(LENGTHS, heads=1, size=64, page=128, entries=3, kind="int8")
    q = queries(len(LENGTHS), 1, 2, 64, "bfloat16")
    options = plan.Options(window=None, softcap=None, scale=0.125, splits=SPLITS)
    arguments = (
        q, made_paged.cache, plan.usable(made_paged.table, made_paged.cache[0].shape[0]),
        jnp.asarray(made_paged.lengths), options, 64,
    )  # fmt: skip
    if kernel == "mosaic_gpu":
        with interpreted() as reports:
            parts = jax.block_until_ready(mosaic_gpu.paged_attention(*arguments, through_shared=True))
        if races_in(reports):
            return np.inf
    else:
        with compiling_for(Chip("tpu", "v5e")):
            parts = jax.block_until_ready(mosaic_tpu.paged_attention(*arguments, interpret=CAREFUL))
    out, _ = plan.merged(parts[0], parts[1], None)
    wanted, _ = brute_force(np.asarray(q, np.float64), made_paged.k, made_paged.v, LENGTHS, scale=0.125)
    return float(np.nan_to_num(np.abs(np.asarray(out) - wanted), nan=np.inf).max())


def without_wait(number: int) -> Callable[[Any], None]:
    """The `number`th wait that the kernel for Hopper states is left out."""

    def plant(patch: Any) -> None:
        stated = iter(range(10**6))

        def barrier_wait(barrier: Any) -> None:
            if next(stated) != number:
                plgpu.barrier_wait(barrier)

        patch.setattr(mosaic_gpu, "plgpu", Other(plgpu, barrier_wait=barrier_wait))

    return plant


def without_merge(patch: Any) -> None:
    """Splits weigh the same, whatever their log-sum-exp."""
    patch.setattr(plan, "merged", lambda out, lse, sinks: (out.mean(0), lse.max(0)))


def one_page_short(patch: Any) -> None:
    """The last page of the ranges is left out."""
    ranges = plan.page_ranges

    def short(*arguments: Any) -> Any:
        first, last = ranges(*arguments)
        return first, jnp.maximum(last - 1, first)

    patch.setattr(plan, "page_ranges", short)


def swapped_scales(patch: Any) -> None:
    """Keys have the scales of values."""
    right = mosaic_gpu._logits

    def logits(kept: Any, *arguments: Any) -> Any:
        return right(kept | {"k_scale": kept["v_scale"]}, *arguments)

    patch.setattr(mosaic_gpu, "_logits", logits)


HOPPER_FAULTS = {
    "a missing barrier: keys are read before they are there": without_wait(1),
    "a missing barrier: values are read before they are there": without_wait(2),
    "a lost merge of splits": without_merge,
    "a bound one page short": one_page_short,
    "swapped scales": swapped_scales,
}


@pytest.mark.parametrize("fault", list(HOPPER_FAULTS))
def test_faults_in_paged_attention_for_hopper_are_found(fault, monkeypatch):
    HOPPER_FAULTS[fault](monkeypatch)
    assert difference("mosaic_gpu") > 0.1


def without_waits(patch: Any) -> None:
    """No copy is waited for."""

    class Hasty:
        def __init__(self, *arguments: Any):
            self.copy = pltpu.make_async_copy(*arguments)

        def __getattr__(self, name: str) -> Any:
            return (lambda: None) if name.startswith("wait") else getattr(self.copy, name)

    patch.setattr(mosaic_tpu, "pltpu", Other(pltpu, make_async_copy=Hasty))


TPU_FAULTS = {
    "a missing wait": without_waits,
    "a lost merge of splits": without_merge,
    "a bound one page short": one_page_short,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(TPU_FAULTS))
def test_faults_in_paged_attention_for_tpus_are_found(fault, monkeypatch):
    TPU_FAULTS[fault](monkeypatch)
    assert difference("mosaic_tpu") > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("end", ["first", "last"])
def test_bounds_of_hopper_attention_one_block_off_are_found(end, monkeypatch):
    right = mosaic_gpu_spans.spans

    def off(*arguments: Any) -> Any:
        spans = right(*arguments)
        first, last = spans[:, :, :-1, 0], spans[:, :, :-1, 3]  # the last entry is what any of them visits
        narrower = (first + 1, last) if end == "first" else (first, last - 1)
        first, last = (
            jnp.where(last - first > 1, new, old) for new, old in zip(narrower, (first, last), strict=True)
        )
        return spans.at[:, :, :-1, 0].set(first).at[:, :, :-1, 3].set(last)

    monkeypatch.setattr(mosaic_gpu_spans, "spans", off)
    with pytest.raises(AssertionError, match=r"of its norm|lse|Not equal"):
        compare(1, 256, 256, 1, 1, 64, 64, forward_key=64, backward=False)


@pytest.mark.slow
def test_without_a_fault_nothing_is_found():
    assert difference("mosaic_gpu") < 0.015
    assert difference("mosaic_tpu") < 0.015
