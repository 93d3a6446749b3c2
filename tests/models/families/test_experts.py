"""What sets the families with experts apart: scalings, layers that are not read, keys that are refused."""

import dataclasses
import itertools
import json
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maxstack
from maxstack.config import UserError
from maxstack.models import MLAConfig, MoEConfig, tree
from maxstack.models.families import family_for, read_config
from maxstack.models.families.deepseek import query_heads, read_attention, rotary_keys
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Place, read_into
from maxstack.models.rope import RopeConfig, rotate
from tests.models.families.test_parity import LOGITS_BOUND, filled, golden, opened


def config_of(name):
    return json.loads(golden(name)["config"].tobytes())


def written(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


REFUSED = [
    ("gptoss-plain", {"quantization_config": {"quant_method": "mxfp4"}}, "quantized .mxfp4."),
    ("deepseek3-plain", {"quantization_config": {"quant_method": "fp8"}}, "quantized .fp8."),
    ("gptoss-plain", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
    ("gptoss-plain", {"experts_per_token": 3}, "experts_per_token is 3"),
    ("mixtral-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("mixtral-plain", {"num_experts_per_tok": 6}, "it must be 1 to moe.experts = 5"),
    ("qwen2moe-window", {"layer_types": None}, "use_sliding_window needs layer_types"),
    ("qwen2moe-window", {"use_sliding_window": False}, "there is no sliding_window in use"),
    ("qwen2moe-plain", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
    ("qwen3moe-plain", {"num_experts": 5, "num_local_experts": 6}, "num_local_experts is 6"),
    ("deepseek2-plain", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("deepseek2-plain", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ("deepseek2-plain", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    ("deepseek2-plain", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek2-plain", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ("deepseek3-plain", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek3-plain", {"n_group": 4}, "6 must be a multiple of moe.groups 4"),
    ("deepseek3-plain", {"n_group": 6, "topk_group": 3}, "group_best is 2, but a group has 1"),
]


@pytest.mark.parametrize(("name", "keys", "told"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, keys, told):
    with pytest.raises(UserError, match=told):
        read_config(config_of(name) | keys, name)


def test_layers_that_predict_further_tokens_are_left_aside_and_said(tmp_path, caplog):
    _, _, tensors = opened("deepseek3-plain")
    further = {
        name.replace("layers.2.", "layers.3."): a for name, a in tensors.items() if "layers.2." in name
    }
    further |= {"model.layers.3.eh_proj.weight": np.ones((20, 40), np.float16)}
    config = config_of("deepseek3-plain") | {"num_nextn_predict_layers": 1}
    with caplog.at_level(logging.WARNING):
        model, _ = maxstack.load(written(tmp_path / "model", config, tensors | further))
    assert "layers that predict further tokens (1) are not read" in caplog.text
    wanted = golden("deepseek3-plain")["logits"]
    given = model(jnp.asarray(golden("deepseek3-plain")["tokens"]))
    np.testing.assert_allclose(given, wanted, rtol=0, atol=LOGITS_BOUND * np.abs(wanted).max())


@pytest.mark.parametrize(
    "name", ["model.layers.2.eh_proj.weight", "model.layers.30.eh_proj.weight", "model.layers.3"]
)
def test_other_tensors_are_still_refused(name, tmp_path):
    _, _, tensors = opened("deepseek3-plain")
    extra = {name: np.ones((2, 2), np.float16)}
    folder = written(tmp_path / "model", config_of("deepseek3-plain"), tensors | extra)
    with pytest.raises(UserError, match=f"unexpected {name}"):
        maxstack.load(folder)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_the_balancing_bias_goes_out_in_float32(kind, tmp_path):
    """Rounded to bfloat16 it would send tokens to other experts."""
    family, config, tensors = opened("deepseek3-plain")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = np.linspace(0.1, 0.2, 6, dtype=np.float32)
    model = filled(family, dataclasses.replace(config, dtype=kind), tensors | {bias: exact})
    maxstack.save(model, None, tmp_path / "model", dtype=kind)
    files = load_file(tmp_path / "model" / "model.safetensors")
    assert files["model.layers.1.mlp.gate.weight"].dtype == jnp.dtype(kind)
    np.testing.assert_array_equal(files[bias], exact)
    again, _ = maxstack.load(tmp_path / "model", dtype="bfloat16")
    np.testing.assert_array_equal(tree.leaves(again)["stacks.1.layers.0.feed_forward.balance"][0], exact)


def scaled(factor, **scaling):
    values = {
        "num_attention_heads": 2, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "kv_lora_rank": 4, "v_head_dim": 4,
        "rope_scaling": {"type": "yarn", "factor": factor, "original_max_position_embeddings": 16, **scaling},
    }  # fmt: skip
    return read_attention(Keys(values, "config.json"))


def test_mscale_changes_the_logits_and_its_ratio_the_rotation():
    plain = scaled(40.0)
    assert plain.scale is None
    assert plain.rope.gain() == pytest.approx(0.1 * np.log(40) + 1)
    both = scaled(40.0, mscale=0.707, mscale_all_dim=0.707)
    assert both.rope.gain() == 1.0
    assert both.scale == pytest.approx((0.0707 * np.log(40) + 1) ** 2 / np.sqrt(14))
    other = scaled(40.0, mscale=1.5, mscale_all_dim=0.5)
    assert other.rope.gain() == pytest.approx((0.15 * np.log(40) + 1) / (0.05 * np.log(40) + 1))
    assert other.scale == pytest.approx((0.05 * np.log(40) + 1) ** 2 / np.sqrt(14))


def test_mscale_is_written_as_it_was_read():
    some = (None, 0.3, 0.707, 1.0, 1.1234567)
    for factor, mscale, all_dims in itertools.product((4, 40.0, 32.5), some, some):
        keys = {"mscale": mscale, "mscale_all_dim": all_dims}
        given = {name: value for name, value in keys.items() if value is not None}
        config = scaled(factor, **given)
        said = rotary_keys(config)["rope_scaling"]
        assert (
            scaled(factor, **{name: said[name] for name in (*keys, "attention_factor") if name in said})
            == config
        )
        if len(given) == 2:
            assert {name: said[name] for name in keys} == keys, said


def test_settings_of_training_do_not_keep_a_model_from_being_written():
    family, config, _ = opened("deepseek3-plain")

    def trained(block):
        if not isinstance(block.feed_forward, MoEConfig):
            return block
        moe = dataclasses.replace(block.feed_forward, bias_rate=1e-3, router_z_loss=0.1, auxiliary_loss=0.3)
        return dataclasses.replace(block, feed_forward=moe)

    stacks = tuple(
        dataclasses.replace(stack, pattern=tuple(trained(block) for block in stack.pattern))
        for stack in config.stacks
    )
    changed = dataclasses.replace(config, stacks=stacks)
    assert changed != config
    assert family_for(changed) is family


def test_only_a_family_with_a_balancing_bias_holds_sigmoid_scores():
    _, config, _ = opened("mixtral-plain")
    block: Any = config.stacks[0].pattern[0]
    moe = dataclasses.replace(block.feed_forward, scoring="sigmoid")
    pattern = (dataclasses.replace(block, feed_forward=moe),)
    stacks = (dataclasses.replace(config.stacks[0], pattern=pattern),)
    with pytest.raises(UserError, match="no family of models holds this one"):
        family_for(dataclasses.replace(config, stacks=stacks))


def test_rotated_pairs_at_the_end_of_query_heads_are_neighbours_in_the_file():
    heads, nope, size, inputs = 3, 2, 6, 5
    config = MLAConfig(heads=heads, kv_rank=4, nope_size=nope, rope_size=size, rope=RopeConfig(theta=50.0))
    form = query_heads(nope, size)(Place(None, None, (inputs, heads, nope + size)))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    tensor, leaf = (
        rng.standard_normal(form.shape, np.float32),
        np.full((inputs, heads, nope + size), np.nan, np.float32),
    )
    read_into(leaf, form, tensor)
    x, at = rng.standard_normal((1, 4, inputs), np.float32), jnp.arange(4)[None]
    table = config.rope.table(at, size)
    given = jnp.einsum("btd,dnh->btnh", x, leaf)
    theirs = (x @ tensor.T).reshape(1, 4, heads, nope + size)
    np.testing.assert_allclose(given[..., :nope], theirs[..., :nope], atol=1e-5)
    pairs = theirs[..., nope::2] + 1j * theirs[..., nope + 1 :: 2]
    turned = pairs * np.asarray(table.cos + 1j * table.sin)[:, :, None]
    wanted = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(given[..., nope:], table), wanted, atol=1e-5)


def test_gpt_oss_without_a_scaling_has_the_published_one():
    config = {key: value for key, value in config_of("gptoss-plain").items() if key != "rope_parameters"}
    rope = read_config(config, "short")[1].stacks[0].pattern[0].attention.rope
    assert (rope.scaling, rope.factor, rope.truncate, rope.theta) == ("yarn", 32.0, False, 150_000.0)
    unscaled = read_config(config | {"rope_scaling": {"rope_type": "default"}}, "none")[1]
    assert unscaled.stacks[0].pattern[0].attention.rope.scaling == "none"


def test_fractions_of_dimensions_bound_yarn_s_ramp():
    rope = RopeConfig(scaling="yarn", theta=100.0, factor=4.0, original_length=16, beta_fast=4.0)
    whole, cut = (
        dataclasses.replace(rope, truncate=truncate).table(jnp.ones((1, 1), int), 10)
        for truncate in (True, False)
    )
    # The ramp ends at dimension 10 ln(16 / 2 pi) / (2 ln 100), which is 1.015, or at 2.
    end = 10 * np.log(16 / (2 * np.pi)) / (2 * np.log(100))
    plain = 100.0 ** -(np.arange(5) / 5)
    np.testing.assert_allclose(np.arcsin(cut.sin[0, 0] / rope.gain()), expected(plain, end), rtol=1e-5)
    np.testing.assert_allclose(np.arcsin(whole.sin[0, 0] / rope.gain()), expected(plain, 2), rtol=1e-5)


def expected(plain, end):
    ramp = np.clip(np.arange(5) / end, 0, 1)
    return plain / 4 * ramp + plain * (1 - ramp)


@pytest.mark.parametrize("name", ["qwen2moe-dense-layers", "deepseek2-groups", "gptoss-full-first"])
def test_layers_of_several_kinds_are_as_few_stacks_as_their_order_allows(name):
    _, config, _ = opened(name)
    kinds = "".join(
        "e" if isinstance(b.feed_forward, MoEConfig) else "d" for s in config.stacks for b in s.pattern
    )
    assert {"qwen2moe-dense-layers": "ded", "deepseek2-groups": "de", "gptoss-full-first": "ee"}[
        name
    ] == kinds
