"""What sets InternLM, Mistral, Qwen, SmolLM3, Granite and OLMo 2 apart: fused tensors, layers' kinds, absent keys."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import maxstack
from maxstack.config import UserError
from maxstack.models.block import scaled
from maxstack.models.families import family_for, read_config
from maxstack.models.families.family import first_blocks
from maxstack.models.families.weights import read_into
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import TransformerConfig
from tests.models.families.test_parity import LOGITS_BOUND, golden, opened
from tests.models.pretrained.test_folder import folder_of


def config_of(name):
    return json.loads(golden(name)["config"].tobytes())


def without(name, *keys):
    return {key: value for key, value in config_of(name).items() if key not in keys}


def windows(config: TransformerConfig) -> list[int | None]:
    return [block.attention.window for block in first_blocks(config)]


@pytest.mark.parametrize("name", ["internlm2-plain", "internlm2-bias", "internlm2-dynamic"])
def test_a_fused_tensor_of_internlm2_is_split_as_its_own_code_splits_the_product(name):
    # That code computes x @ wqkv.T (+ bias) and takes it apart as (kv head, queries | key | value, size).
    family, config, tensors = opened(name)
    a = first_blocks(config)[0].attention
    x = np.random.default_rng(0).standard_normal((5, config.width)).astype(np.float32)
    prefix = "model.layers.0.attention.wqkv."
    product = x @ tensors[prefix + "weight"].astype(np.float32).T + tensors.get(prefix + "bias", 0.0)
    groups = product.reshape(5, a.kv_heads, -1, a.head_size)
    wanted = {
        "q": groups[:, :, :-2].reshape(5, a.heads, a.head_size),
        "k": groups[:, :, -2],
        "v": groups[:, :, -1],
    }
    for part, heads in wanted.items():
        leaves = {}
        for entry in family.entries(config):
            if entry.leaf.endswith((f"attention.{part}.w", f"attention.{part}.b")) and entry.index == (0,):
                shape = (config.width,) if entry.leaf.endswith("w") else ()
                leaves[entry.leaf[-1]] = np.full((*shape, heads.shape[1], a.head_size), np.nan, np.float32)
                read_into(leaves[entry.leaf[-1]], entry.form, tensors[entry.source])
        given = np.einsum("td,dnh->tnh", x, leaves["w"]) + leaves.get("b", 0.0)
        np.testing.assert_allclose(given, heads, rtol=0, atol=1e-5 * np.abs(heads).max())


@pytest.mark.parametrize("name", ["internlm-plain", "internlm2-dynamic", "internlm3-plain"])
def test_a_model_of_internlm_can_be_written_as_llama(name, tmp_path):
    # transformers has no classes for the first two.
    model, _ = maxstack.load(folder_of(name, tmp_path / "source"))
    if name == "internlm-plain":
        assert family_for(model.config).name == "Llama"
    maxstack.save(model, None, tmp_path / "target", family="llama")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["model_type"] == "llama"
    again, _ = maxstack.load(tmp_path / "target")
    wanted = golden(name)["logits"]
    given = again(jnp.asarray(golden(name)["tokens"]))
    np.testing.assert_allclose(given, wanted, rtol=0, atol=LOGITS_BOUND * np.abs(wanted).max())


def test_what_is_written_for_internlm_is_what_its_own_code_reads():
    for name in ("internlm-plain", "internlm-dynamic", "internlm2-bias", "internlm2-dynamic"):
        family, config, _ = opened(name)
        written = family.keys(config)
        if family.name == "InternLM":
            assert set(written["rotary"]) <= {"base", "type", "scaling_factor"}
            assert not {"rope_theta", "rope_scaling", "head_dim"} & written.keys()
        else:  # any more keys there, and its code refuses the config
            assert set(written["rope_scaling"]) == {"type", "factor"}
    family, config, _ = opened("internlm3-qkv-bias")
    assert family.keys(config).items() >= {"qkv_bias": True, "bias": False}.items()


def test_internlm_1_scales_dynamically_by_a_factor_of_1_unless_told_otherwise():
    _, config = read_config(without("internlm-plain", "rotary"), "bare")
    assert first_blocks(config)[0].attention.rope == RopeConfig(
        theta=10_000.0, scaling="dynamic", factor=1.0, original_length=config.max_length
    )


def test_both_ways_to_say_the_biases_of_internlm3_are_one():
    theirs = without("internlm3-bias", "attention_bias", "mlp_bias", "qkv_bias", "bias")
    for said in ({"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "bias": True}):
        assert read_config(theirs | said, "one")[1] == opened("internlm3-bias")[1]
    with pytest.raises(UserError, match="qkv_bias is False"):
        read_config(theirs | {"attention_bias": True, "qkv_bias": False}, "two")


@pytest.mark.parametrize("sliding_window", ["absent", None, 7])
def test_an_absent_window_of_mistral_is_4096_tokens_and_null_is_none(sliding_window):
    values = without("mistral-plain", "sliding_window")
    if sliding_window != "absent":
        values["sliding_window"] = sliding_window
    wanted = 4096 if sliding_window == "absent" else sliding_window
    assert windows(read_config(values, "m")[1]) == [wanted] * 3


def test_windows_of_qwen_are_in_the_last_layers_unless_layer_types_says_otherwise():
    values = without("qwen2-window", "layer_types") | {"max_window_layers": 3}
    assert windows(read_config(values, "q")[1]) == [None, None, None, 9]
    assert windows(read_config(values | {"use_sliding_window": False}, "q")[1]) == [None] * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(read_config(values | {"layer_types": kinds}, "q")[1]) == [9, None, 9, None]


def test_windows_of_smollm3_are_in_the_layers_without_rotation_unless_layer_types_says_otherwise():
    values = without("smollm3-window", "layer_types", "no_rope_layers") | {"max_window_layers": 1}
    _, config = read_config(values, "s")
    assert [block.attention.rope is None for block in first_blocks(config)] == [False, True, False]
    assert windows(config) == [None, 9, None]


def test_layers_of_smollm3_are_one_pattern_of_four():
    values = without("smollm3-plain", "no_rope_layers", "layer_types") | {"num_hidden_layers": 36}
    (stack,) = read_config(values, "s")[1].stacks
    assert stack.repeats == 9
    assert [block.attention.rope is None for block in stack.pattern] == [False, False, False, True]


def test_a_llama_of_usual_scale_is_a_granite_too():
    _, config, _ = opened("llama-plain")
    granite = family_for(config, prefer="granite")
    assert granite.keys(config)["attention_multiplier"] == pytest.approx(10**-0.5)


def test_a_residual_multiplier_is_not_rounded_to_bfloat16():
    # 0.22 rounded to bfloat16 is 0.2197: the same relative error of 1.2e-3 in every layer.
    x = jnp.linspace(1.0, 2.0, 129, dtype=jnp.bfloat16)[None, None]
    wide = np.asarray(x, np.float64) * 0.22
    given = np.asarray(scaled(x, 0.22), np.float64)
    assert abs(np.mean(given / wide) - 1.0) < 2e-4


REFUSED = [
    ("internlm-plain", {"rotary": {"base": 100.0, "type": "yarn"}}, "rotary.type is 'yarn'"),
    ("internlm-plain", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ("internlm-plain", {"rope_theta": 5.0}, "unknown rope_theta=5.0 for a InternLM model"),
    ("internlm2-plain", {"head_dim": 4}, "head_dim is 4"),
    ("internlm2-plain", {"hidden_size": 50}, "hidden_size 50 must be a multiple of num_attention_heads 6"),
    (
        "internlm2-plain",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        "linear or dynamic rotary scaling",
    ),
    ("internlm2-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("internlm3-plain", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("mistral-plain", {"layer_types": ["full_attention"] * 3}, "unknown layer_types"),
    ("qwen2-plain", {"use_mrope": True}, "use_mrope is True"),
    (
        "qwen2-plain",
        {"dual_chunk_attention_config": {"chunk_size": 9}},
        "unknown dual_chunk_attention_config",
    ),
    ("qwen2-plain", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window in use"),
    ("qwen2-plain", {"layer_types": [["sliding_attention"]] * 3}, "3 of full_attention or sliding_attention"),
    ("qwen3-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("smollm3-plain", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]: 5 of 0"),
    ("smollm3-plain", {"no_rope_layers": [1, 0, 2, 1, 1]}, "no rotation"),
    ("granite-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("olmo2-plain", {"clip_qkv": 8.0}, "unknown clip_qkv=8.0"),
    ("llama-plain", {"rope_interleaved": True}, "rope_interleaved is True"),
]


@pytest.mark.parametrize(("name", "keys", "told"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, keys, told):
    with pytest.raises(UserError, match=told):
        read_config(config_of(name) | keys, name)
