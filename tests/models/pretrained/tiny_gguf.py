"""Tiny models for GGUF files: the golden ones with the vocabulary of a tokenizer, and random ones of their configs."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.data.tokenizer import train_bpe
from maxstack.models import tree
from maxstack.models.families import read_config
from maxstack.models.transformer import Transformer, TransformerConfig
from tests.models.families.test_parity import filled, golden

TEXT = ["the quick brown fox jumps over the lazy dog " * 3, "pack my box with five dozen liquor jugs " * 3]
TOKENIZER = train_bpe(TEXT, 280)
VOCAB = 288


def config_of(name: str, changes: Mapping[str, Any] = {}):
    """Family and config of a golden model; `changes` are other values for keys of its config.json."""
    values = json.loads(golden(name)["config"].tobytes())
    family, config = read_config(values | changes, name)
    return family, dataclasses.replace(config, dtype="float32")


def golden_model(name: str, changes: Mapping[str, Any] = {}) -> tuple[Transformer, np.ndarray]:
    """The golden model and its tokens [b, t]; further tokens of the vocabulary have embeddings of zero."""
    arrays = golden(name)
    family, config = config_of(name, changes)
    model = filled(family, config, {key[2:]: arrays[key] for key in arrays if key.startswith("w:")})
    more = VOCAB - config.vocab_size
    rows = {"embedding.table": ((0, more), (0, 0)), "head": ((0, 0), (0, more))}
    leaves = {
        leaf: jnp.pad(array, rows[leaf]) if leaf in rows else array
        for leaf, array in tree.leaves(model).items()
    }
    return rebuilt(config, leaves), arrays["tokens"]


def random_model(name: str, changes: Mapping[str, Any] = {}) -> tuple[Transformer, np.ndarray]:
    """Of a golden model's config, no leaf of which is at its initial value, and the golden model's tokens [b, t].

    Leaves that the family's files have no tensor for stay at their initial value.
    """
    family, config = config_of(name, changes)
    config = dataclasses.replace(config, vocab_size=VOCAB)
    rng, leaves = np.random.default_rng(0), tree.leaves(config.build(jax.random.key(0)))
    moved = {
        leaf: array + 0.2 * rng.standard_normal(array.shape).astype(np.float32) * (np.std(array) or 1.0)
        for leaf, array in leaves.items()
        if not leaf.endswith(family.absent)
    }
    return rebuilt(config, leaves | moved), golden(name)["tokens"]


def rebuilt(config: TransformerConfig, leaves: Mapping[str, Any]) -> Transformer:
    config = dataclasses.replace(config, vocab_size=VOCAB)
    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    return tree.rebuild(abstract, {leaf: jnp.asarray(array) for leaf, array in leaves.items()})
