"""Decoding with a cache gives, in every family, the logits of a full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models.decode import decode, init_cache
from tests.models.families.test_parity import NAMES, QUICK, filled, golden, opened

PREFILLED = 24
"""Tokens read at once: more than any golden window, than the original context of those with long factors, and fewer,
with all that follow here, than that of those that scale by length."""
CHUNKS = (1, 1, 3)
BOUND = 3e-5
"""Of the largest logit: float32 sums in another order, over cache slots instead of a row's tokens."""


@pytest.mark.parametrize("name", NAMES)
def test_cached_decode_equals_full_forward(name):
    family, config, tensors = opened(name)
    model = filled(family, dataclasses.replace(config, dtype="float32"), tensors)
    ids = jnp.asarray(golden(name)["tokens"])[:, : PREFILLED + sum(CHUNKS)]
    wanted = np.asarray(jax.jit(lambda model, ids: model(ids), compiler_options=QUICK)(model, ids))
    step = jax.jit(decode, compiler_options=QUICK)
    given, cache = step(model, ids[:, :PREFILLED], init_cache(model.config, ids.shape[0], 32))
    at = PREFILLED
    bound = {"rtol": 0, "atol": BOUND * np.abs(wanted).max()}
    np.testing.assert_allclose(given, wanted[:, at - 1], **bound)
    for size in CHUNKS:
        given, cache = step(model, ids[:, at : at + size], cache)
        at += size
        np.testing.assert_allclose(given, wanted[:, at - 1], **bound, err_msg=f"after {at} tokens")
