"""The choice of a backend, and the compilers of chips that are not there."""

import logging

import jax
import jax.numpy as jnp
import pytest

from maxstack.kernels import Unsupported, dispatch
from maxstack.kernels.dispatch import CPU, Chip, chip, chip_of, choose, compiling_for, only_on
from tests.kernels.chips import TPUS, compiled_for, device_of, needs_cuda_compiler, needs_libtpu, shapes


def test_auto_takes_the_first_that_can_and_says_once_why_others_did_not(monkeypatch):
    said = []
    monkeypatch.setattr(dispatch.log, "log", lambda level, form, *parts: said.append((level, form % parts)))
    with compiling_for(Chip("gpu", "sm80")):
        for _ in range(2):
            assert choose("dance", "auto", {"mosaic_gpu": "needs Hopper", "xla": None, "slow": None}) == "xla"
    assert said == [(logging.INFO, "dance on sm80: xla (mosaic_gpu: needs Hopper)")]


def test_a_named_backend_never_falls_back():
    backends = {"mosaic_gpu": "it needs a GPU, and this is a cpu", "xla": None}
    with pytest.raises(Unsupported, match=r"dance: 'mosaic_gpu' cannot serve this call: it needs a GPU"):
        choose("dance", "mosaic_gpu", backends)
    with pytest.raises(ValueError, match=r"unknown implementation 'cudnn'; known: auto, mosaic_gpu, xla"):
        choose("dance", "cudnn", backends)
    with pytest.raises(Unsupported, match="no implementation can serve this call"):
        choose("dance", "auto", {"mosaic_gpu": "no", "reference": None}, named_only=("reference",))


def test_the_chip_is_that_at_hand_or_that_compiled_for():
    assert chip() == chip_of(jax.devices()[0])
    with compiling_for(Chip("tpu", "v6e")):
        assert only_on("tpu") is None
        assert only_on("gpu") == "it needs a GPU, and this is a v6e"
    assert chip_of(jax.devices("cpu")[0]) == CPU


@needs_libtpu
@pytest.mark.parametrize("name", TPUS)
def test_tpu_generations_are_told_apart_and_compiled_for(name):
    assert chip_of(device_of(name)) == Chip("tpu", name)
    program = compiled_for(
        name, lambda x: chip().name == name and jnp.sin(x) @ x, *shapes(((128, 128), jnp.float32))
    )
    assert program.cost_analysis()["flops"] > 2 * 128**3 * 0.9


@needs_cuda_compiler
def test_hopper_is_told_and_compiled_for():
    assert chip_of(device_of("h200")) == Chip("gpu", "sm90")
    program = compiled_for("h200", lambda x: jnp.sin(x) @ x, *shapes(((128, 128), jnp.float32)))
    assert "sin" in (program.as_text() or "")
