"""GGUF files in and out: a model comes back as it was, or is refused by name when the format cannot say it."""

import jax
import numpy as np
import pytest

import maxstack
from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.families import FAMILIES
from maxstack.models.presets import llama
from maxstack.models.pretrained.architectures import FACTORS
from maxstack.models.pretrained.gguf import described
from maxstack.models.pretrained.gguf_writing import held_by, rounded
from maxstack.models.rope import RopeConfig
from tests.models.families.test_parity import NAMES
from tests.models.pretrained.tiny_gguf import TEXT, TOKENIZER, VOCAB, config_of, random_model

# Each row of the table with a golden model that it holds as it is, or with other values for these keys.
ROUND_TRIPS: dict[str, dict] = {
    "llama-linear": {}, "mistral-no-window": {}, "internlm3-qkv-bias": {}, "internlm2-plain": {}, "mixtral-plain": {},
    "qwen2-plain": {"head_dim": 6, "hidden_size": 36}, "qwen3-plain": {}, "qwen2moe-plain": {}, "qwen3moe-plain": {},
    "gemma-plain": {}, "gemma2-plain": {"query_pre_attn_scalar": 10}, "gemma3-plain": {"query_pre_attn_scalar": 10},
    "phi3-long": {}, "phi3-gain": {}, "granite-plain": {}, "glm4-plain": {}, "smollm3-plain": {}, "gpt2-inner": {},
    "olmo2-plain": {"head_dim": 6, "hidden_size": 36}, "gptoss-full-first": {}, "deepseek3-plain": {},
    "deepseek2-plain": {"rms_norm_eps": 1e-6, "num_hidden_layers": 27},
}  # fmt: skip
# Golden models that no architecture of their family's holds, and why.
REFUSED = {
    "rotation that no key says": {
        "llama-dynamic", "llama-llama3", "llama-yarn", "mistral-yarn", "qwen3-yarn", "gemma-llama3", "gemma2-yarn",
        "glm4-yarn", "granite-yarn", "granite-bias", "internlm-dynamic", "internlm-no-bias", "internlm2-dynamic",
        "internlm3-plain", "glm4-no-bias",
        # llama.cpp rounds where the ramp begins and ends.
        "gptoss-plain",
    },
    "a window that llama.cpp does not apply": {
        "mistral-plain", "mixtral-window", "phi3-plain", "qwen2-window", "qwen2-yarn", "qwen2moe-window",
        "qwen3moe-window", "smollm3-yarn",
    },
    "biases that it does not add": {
        "gemma-bias", "gemma2-odd", "gemma3-bias", "qwen3-bias", "qwen3moe-dense-layers", "olmo2-bias",
        "smollm3-window", "deepseek2-bias", "deepseek3-yarn",
    },
    "a factor on attention's logits that it does not take": {"gemma2-plain", "gemma3-plain", "gemma3-linear"},
    "heads that together are not as wide as the model": {"qwen2-plain", "olmo2-plain", "olmo2-yarn", "phi3-head-size"},
    "a tied output projection": {"internlm2-bias", "gptoss-no-bias"},
    "experts that it routes otherwise": {"deepseek2-groups", "qwen2moe-dense-layers"},
    "queries without a latent, but not 26 or 27 layers": {"deepseek3-one-group"},
    "latents' norms of another epsilon": {"deepseek2-plain"},
    "the exact GELU": {"gpt2-one-head"},
    "its first generation's architecture has no row": {"glm-plain", "glm-no-bias", "glm-quarter"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_model_comes_back_as_it_was(name, tmp_path):
    family, _ = config_of(name)
    (model, _), file = random_model(name, ROUND_TRIPS[name]), tmp_path / "model.gguf"
    maxstack.save(model, TOKENIZER, file, format="gguf", family=family.name)
    again, tokenizer = maxstack.load(file, dtype="float32")
    assert rounded(again.config) == rounded(model.config)
    leaves = tree.leaves(again)
    for leaf, array in tree.leaves(model).items():
        # Gemma's norms are kept with 1 added, in the float32 in which they are used.
        more = np.float32(family.name.startswith("Gemma") and leaf.endswith("norm.scale"))
        np.testing.assert_array_equal(np.asarray(leaves[leaf]) + more, np.asarray(array) + more, err_msg=leaf)
    assert tokenizer is not None
    assert tokenizer.encode(TEXT[0]) == TOKENIZER.encode(TEXT[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_model_is_held_or_refused(name):
    family, config = config_of(name)
    if not any(name in names for names in REFUSED.values()):
        assert set(held_by(config, family.name).row.model_types) & set(family.model_types)
        return
    with pytest.raises(UserError, match="no GGUF architecture that is written here holds this model"):
        held_by(config, family.name)


def test_a_model_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no GGUF architecture"):
        maxstack.save(random_model("llama-dynamic")[0], TOKENIZER, tmp_path / "model.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


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
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama.expert_shared_count": 8}, "unknown llama.expert_shared_count"),
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
    model, _ = random_model("llama-plain")
    with pytest.raises(UserError, match="carries its tokenizer"):
        maxstack.save(model, None, tmp_path / "model.gguf", format="gguf")
    with pytest.raises(UserError, match="holds this model as Gemma"):
        maxstack.save(model, TOKENIZER, tmp_path / "model.gguf", format="gguf", family="Gemma")
    assert "Gemma" in {family.name for family in FAMILIES}
