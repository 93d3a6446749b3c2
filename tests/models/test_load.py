"""A trained model by name: what of the run that made it stays with it."""

import dataclasses

import jax
import numpy as np

from maxstack.checkpoint import Checkpoints
from maxstack.config import to_dict
from maxstack.models import tree
from maxstack.models.load import load
from tests.models.tiny import CONFIGS, build, tokens


def test_a_model_trained_with_offload_answers_where_nothing_can_be_offloaded(tmp_path):
    config = dataclasses.replace(CONFIGS["grouped"], remat="offload")
    model, ids = build(CONFIGS["grouped"]), tokens(1, 4)
    state = {"params": tree.leaves(model)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"model": to_dict(config)})
    loaded, _ = load(tmp_path)
    assert loaded.config == CONFIGS["grouped"]
    np.testing.assert_array_equal(jax.jit(lambda m: m(ids))(loaded), jax.jit(lambda m: m(ids))(model))
