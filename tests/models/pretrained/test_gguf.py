"""GGUF files in and out: a model comes back as it was, or is refused by name when the format cannot say it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import maxstack
from maxstack.config import UserError
from maxstack.data.tokenizer import train_bpe
from maxstack.models import tree
from maxstack.models.families import FAMILIES, read_config
from maxstack.models.presets import llama
from maxstack.models.pretrained.architectures import FACTORS
from maxstack.models.pretrained.gguf import described
from maxstack.models.rope import RopeConfig
from tests.models.families.test_parity import NAMES, golden

TEXT = ["the quick brown fox jumps over the lazy dog " * 3, "pack my box with five dozen liquor jugs " * 3]
TOKENIZER = train_bpe(TEXT, 280)
VOCAB = 288
# Windows, odd settings of a scaling, biases of the feed-forward: no key of these architectures says them.
REFUSED = {
    "llama-dynamic", "llama-llama3", "llama-yarn", "mistral-plain", "mistral-yarn", "qwen2-window", "qwen2-yarn",
    "qwen3-bias", "qwen3-yarn",
}  # fmt: skip
HELD = [name for name in NAMES if name.partition("-")[0] in ("llama", "mistral", "qwen2", "qwen3")]


def model_like(name: str, **changes):
    """A random model of a golden model's config."""
    _, config = read_config(json.loads(golden(name)["config"].tobytes()), name)
    return dataclasses.replace(config, vocab_size=VOCAB, dtype="float32", **changes).build(jax.random.key(0))


@pytest.mark.parametrize("name", HELD)
def test_a_model_comes_back_as_it_was_or_is_refused(name, tmp_path):
    model, file = model_like(name), tmp_path / "model.gguf"
    if name in REFUSED:
        with pytest.raises(UserError, match="no GGUF architecture that is written here holds this model"):
            maxstack.save(model, TOKENIZER, file, format="gguf")
        assert not list(tmp_path.iterdir())
        return
    maxstack.save(model, TOKENIZER, file, format="gguf")
    again, tokenizer = maxstack.load(file, dtype="float32")
    assert again.config == model.config
    for leaf, array in tree.leaves(model).items():
        np.testing.assert_array_equal(array, tree.leaves(again)[leaf], err_msg=leaf)
    assert tokenizer is not None
    assert tokenizer.encode(TEXT[0]) == TOKENIZER.encode(TEXT[0])


def test_llama_3_scaling_comes_back_from_its_factors(tmp_path):
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0)
    config = llama(
        vocab_size=VOCAB, width=32, depth=2, heads=2, kv_heads=1, feed_forward=32, rope=rope, dtype="float32"
    )
    maxstack.save(config.build(jax.random.key(0)), TOKENIZER, tmp_path / "model.gguf", format="gguf")
    assert maxstack.load(tmp_path / "model.gguf", dtype="float32")[0].config == config


@pytest.mark.parametrize(
    ("dtype", "most"), [("q8_0", 0.01), ("q4_0", 0.12), ("float16", 1e-3), ("bfloat16", 5e-3)]
)
def test_smaller_types_lose_what_they_must(dtype, most, tmp_path):
    config = llama(vocab_size=VOCAB, width=32, depth=2, heads=2, kv_heads=1, feed_forward=64, dtype="float32")
    model = config.build(jax.random.key(0))
    manifest = maxstack.save(model, TOKENIZER, tmp_path / "model.gguf", format="gguf", dtype=dtype)
    assert most / 10 < manifest["largest_weight_difference"]["of_its_size"] < most


def test_weights_of_a_model_that_computes_in_bfloat16_are_compared_as_they_are(tmp_path):
    config = llama(vocab_size=VOCAB, width=32, depth=2, heads=2, kv_heads=1, feed_forward=64)
    manifest = maxstack.save(
        config.build(jax.random.key(0)), TOKENIZER, tmp_path / "model.gguf", format="gguf"
    )
    assert manifest["dtype"] == "F32"
    assert manifest["largest_logit_difference"] == 0.0


METADATA = {
    "general.architecture": "llama", "llama.embedding_length": 32, "llama.block_count": 2, "llama.vocab_size": VOCAB,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 64,
    "llama.context_length": 128, "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
}  # fmt: skip


def test_floats_are_those_that_were_meant():
    config = described(METADATA, (), {}, "a file").config
    assert config.final_norm.eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"general.architecture": "wonder"}, "'wonder' is not supported; these are: llama"),
        ({"llama.attention.sliding_window": 64}, "unknown llama.attention.sliding_window"),
        ({"llama.expert_count": 8}, "unknown llama.expert_count"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "unknown llama.rope.scaling.attn_factor"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv is .1, 2., not a number"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, told):
    with pytest.raises(UserError, match=told):
        described(METADATA | changes, (), {}, "a file")


def test_other_factors_than_llama_3_s_are_refused():
    with pytest.raises(UserError, match=FACTORS):
        described(METADATA, (), {FACTORS: np.linspace(1, 8, 8, dtype=np.float32)}, "a file")


def test_a_model_without_tokenizer_or_of_another_family_is_refused(tmp_path):
    model = model_like("llama-plain")
    with pytest.raises(UserError, match="carries its tokenizer"):
        maxstack.save(model, None, tmp_path / "model.gguf", format="gguf")
    with pytest.raises(UserError, match="holds this model as Gemma"):
        maxstack.save(model, TOKENIZER, tmp_path / "model.gguf", format="gguf", family="Gemma")
    assert "Gemma" in {family.name for family in FAMILIES}
