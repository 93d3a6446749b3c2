"""GGUF files in and out: a model comes back as it was, or is refused by name when the format cannot say it."""

import jax
import numpy as np
import pytest

import maxstack
from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.families import FAMILIES
from maxstack.models.families.family import first_blocks
from maxstack.models.files import GGUF, Export, TensorInfo, write_gguf
from maxstack.models.presets import llama
from maxstack.models.pretrained.architectures import FACTORS
from maxstack.models.pretrained.gguf import Stored, described
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


# One of each way that tensors lie; the others take as long and say less.
QUICK = {
    "llama-linear",
    "mixtral-plain",
    "phi3-long",
    "gpt2-inner",
    "glm4-plain",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ROUND_TRIPS]
)
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


def of(name: str, **keys) -> dict:
    """Metadata of an architecture as llama.cpp's conversion writes it; `__` stands for a dot."""
    base = {
        "embedding_length": 32, "block_count": 4, "attention.head_count": 4, "attention.head_count_kv": 2,
        "feed_forward_length": 64, "context_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    own = base | {key.replace("__", "."): value for key, value in keys.items()}
    tokens = {"tokenizer.ggml.tokens": ["a"] * VOCAB}
    return {"general.architecture": name} | tokens | {f"{name}.{key}": value for key, value in own.items()}


def attention_of(metadata: dict, names: tuple = (), factors: dict | None = None) -> list:
    config = described(metadata, names, factors or {}, "a file").config
    return [block.attention for block in first_blocks(config)]


def test_gemma_2_is_read_as_its_conversion_writes_it():
    metadata = of(
        "gemma2", attention__key_length=8, attention__value_length=8, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, attention__sliding_window=16,
    )  # fmt: skip
    attention = attention_of(metadata)
    assert [a.window for a in attention] == [16, None, 16, None]
    assert {(a.softcap, a.scale) for a in attention} == {(50.0, None)}


def test_gemma_3_s_layers_have_two_kinds_of_rotation():
    metadata = of(
        "gemma3", block_count=8, attention__key_length=16, attention__value_length=16, rope__freq_base=1e6,
        attention__sliding_window=16, rope__scaling__type="linear", rope__scaling__factor=8.0,
    )  # fmt: skip
    attention = attention_of(metadata)
    assert [a.window for a in attention] == [16] * 5 + [None] + [16] * 2
    assert (attention[0].rope.theta, attention[0].rope.scaling) == (10_000.0, "none")
    assert (attention[5].rope.theta, attention[5].rope.factor) == (1e6, 8.0)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_attention_by_width_over_heads(name, layers):
    metadata = of(name, block_count=layers, attention__key_length=16, attention__value_length=16)
    assert {a.scale for a in attention_of(metadata)} == {8**-0.5}


def test_phi_3_s_factors_make_longrope_without_a_type():
    metadata = of(
        "phi3", context_length=131_072, rope__dimension_count=6, rope__scaling__original_context_length=4096,
        rope__scaling__attn_factor=float(np.float32(1.1902381)), attention__sliding_window=262_144,
    )  # fmt: skip
    factors = {
        "rope_factors_short.weight": np.float32([1, 1.08, 1.2]),
        "rope_factors_long.weight": np.float32([1, 2, 3]),
    }
    rope = attention_of(metadata, (), factors)[0].rope
    assert (rope.scaling, rope.fraction, rope.factor, rope.original_length) == ("longrope", 0.75, 32.0, 4096)
    assert (rope.short_factors, rope.attention_factor) == ((1.0, 1.08, 1.2), None)


def test_gpt_oss_is_read_as_published():
    metadata = of(
        "gpt-oss", rope__freq_base=150_000.0, rope__scaling__type="yarn", rope__scaling__factor=32.0,
        rope__scaling__original_context_length=4096, rope__scaling__yarn_beta_fast=32.0,
        rope__scaling__yarn_beta_slow=1.0, expert_count=8, expert_used_count=2, attention__sliding_window=16,
        expert_feed_forward_length=32,
    )  # fmt: skip
    attention = attention_of(metadata, ("output.weight", "blk.0.attn_output.bias"))
    assert [a.window for a in attention] == [16, None] * 2
    assert (attention[0].rope.scaling, attention[0].rope.truncate) == ("yarn", False)


DEEPSEEK = {
    "attention__head_count_kv": 1, "attention__kv_lora_rank": 16, "attention__q_lora_rank": 12,
    "rope__dimension_count": 8, "attention__key_length": 24, "attention__value_length": 16,
    "attention__key_length_mla": 14, "attention__value_length_mla": 7, "leading_dense_block_count": 1,
    "expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": 32,
    "rope__scaling__type": "yarn", "rope__scaling__factor": 40.0, "rope__scaling__original_context_length": 4096,
    "rope__scaling__yarn_log_multiplier": float(np.float32(0.0707)),
}  # fmt: skip


def test_deepseek_s_scaling_is_a_tenth_of_a_key():
    attention = attention_of(of("deepseek2", **DEEPSEEK))[0]
    assert attention.scale == 14**-0.5 * (0.1 * 0.707 * np.log(40.0) + 1.0) ** 2
    assert attention.rope.gain() == 1.0


def test_older_files_of_deepseek_have_one_map_to_keys_and_values():
    keys = {key: value for key, value in DEEPSEEK.items() if not key.endswith("_mla")}
    keys |= {"attention__head_count_kv": 4, "attention__key_length": 14, "attention__value_length": 7}
    _, family, config = described(of("deepseek2", **keys), (), {}, "a file")
    assert first_blocks(config)[0].attention.v_size == 7
    names = {entry.source for entry in family.entries(config)}
    assert "blk.0.attn_kv_b.weight" in names
    assert "blk.0.attn_k_b.weight" not in names


def test_a_vector_may_be_kept_as_a_matrix_of_one_row(tmp_path):
    name, array = "blk.0.ffn_gate_inp_shexp.weight", np.arange(8, dtype=np.float32)[None]
    write_gguf(tmp_path / "a.gguf", {}, [Export(name, TensorInfo((1, 8), "float32"), "F32", lambda: array)])
    with GGUF(tmp_path / "a.gguf") as file:
        stored = Stored(file, {name: (8,)}, None)
        assert stored.info(name).shape == (8,)
        np.testing.assert_array_equal(stored.read(name, 2, 5), array[0, 2:5])


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (of("granite", logit_scale=8.0, rope__scaling__finetuned=False), "finetuned is False"),
        (of("granite", logit_scale=0.0), "logit_scale is 0"),
        (of("gemma2", rope__freq_base_swa=5.0), "freq_base_swa is 5.0"),
        (of("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=[True]), "4 of true or false"),
        (of("gemma", rope__scaling__type="longrope"), "type is 'longrope'"),
        (of("phi3", rope__scaling__attn_factor=1.2), "unknown phi3.rope.scaling.attn_factor"),
        (of("phi3", rope__dimension_count=16), "dimension_count is 16 of heads of 8"),
        (of("glm4", rope__dimension_sections=[8, 12, 12, 0]), "unknown glm4.rope.dimension_sections"),
        (of("qwen2", attention__key_length=16), "key_length is 16"),
        (of("qwen3", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__yarn_beta_fast=8.0),
         "yarn_beta_fast is 8.0"),
        (of("qwen3moe", expert_count=8, expert_used_count=2, expert_weights_scale=2.0), "unknown qwen3moe.expert"),
        (of("deepseek2", **DEEPSEEK, expert_group_count=4), "expert_group_count is 4"),
        (of("deepseek2", **DEEPSEEK | {"attention__layer_norm_rms_epsilon": 1e-5}), "not 1e-06"),
        (of("internlm2"), "output.weight is missing"),
    ],
)  # fmt: skip
def test_what_an_architecture_does_not_have_is_refused_by_name(metadata, told):
    with pytest.raises(UserError, match=told):
        described(metadata, (), {}, "a file")
