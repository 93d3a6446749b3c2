"""What sets Gemma, Phi, GLM and GPT-2 apart: names in their files, forms of their weights, keys that are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import maxstack
from maxstack import sharding
from maxstack.config import UserError
from maxstack.models import BlockConfig, tree
from maxstack.models.attention import AttentionConfig
from maxstack.models.families import read_config
from maxstack.models.families.family import stacks_of
from maxstack.models.families.weights import Place, interleaved, read_into, rows, write_from
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.rope import RopeConfig, rotate
from maxstack.models.transformer import StackConfig
from maxstack.optim.layout import decay_mask, muon_dims
from maxstack.sharding import MeshConfig
from tests.models.families.test_parity import LOGITS_BOUND, golden, opened


def written(folder, name, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    model, _ = maxstack.load(folder)
    wanted = golden(name)["logits"]
    given = model(jnp.asarray(golden(name)["tokens"]))
    np.testing.assert_allclose(given, wanted, rtol=0, atol=LOGITS_BOUND * np.abs(wanted).max())


def config_of(name):
    return json.loads(golden(name)["config"].tobytes())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_gemma_3_that_sees_images_is_read(prefix, tmp_path, caplog):
    _, _, tensors = opened("gemma3-plain")
    seeing = {prefix + key.removeprefix("model."): value for key, value in tensors.items()}
    before = "model." if prefix.startswith("model.") else ""
    for name in (
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    ):
        seeing[before + name] = np.ones(4, np.float16)
    config = {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "boi_token_index": 5, "image_token_index": 6,
        "vision_config": {"hidden_size": 4}, "text_config": config_of("gemma3-plain"),
    }  # fmt: skip
    written(tmp_path / "model", "gemma3-plain", config, seeing)
    assert "only its text model is read" in caplog.text


def test_unknown_tensors_of_a_gemma_3_are_still_refused(tmp_path):
    _, _, tensors = opened("gemma3-plain")
    with pytest.raises(UserError, match=r"unexpected audio_tower\.w"):
        written(
            tmp_path / "model", "gemma3-plain", config_of("gemma3-plain"),
            tensors | {"audio_tower.w": np.ones(4, np.float16)},
        )  # fmt: skip


def test_gpt2_files_without_a_prefix_and_with_stored_masks_are_read(tmp_path):
    _, _, tensors = opened("gpt2-plain")
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = np.tril(np.ones((48, 48), np.float16))[None, None]
        bare[f"h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float16)
    written(tmp_path / "model", "gpt2-plain", config_of("gpt2-plain"), bare)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    _, _, tensors = opened("gpt2-plain")
    twice = tensors | {"wte.weight": tensors["transformer.wte.weight"]}
    with pytest.raises(UserError, match="two names of one tensor"):
        written(tmp_path / "model", "gpt2-plain", config_of("gpt2-plain"), twice)


def test_more_tokens_than_learned_positions_are_refused():
    _, config, _ = opened("gpt2-one-head")
    model = tree.abstract(lambda: config.build(jax.random.key(0)))
    with pytest.raises(UserError, match="41 tokens are given to a model that has learned 40 positions"):
        jax.eval_shape(lambda model: model(jnp.zeros((1, 41), jnp.int32)), model)


REFUSED = [
    ("gemma-plain", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma-plain", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("gemma2-plain", {"layer_types": ["full_attention"]}, "4 of sliding_attention or full_attention"),
    ("gemma2-plain", {"sliding_window_size": 3}, "sliding_window_size is 3"),
    ("gemma3-plain", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("phi3-plain", {"attention_bias": True}, "attention_bias is True"),
    ("phi3-plain", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "longrope scaling or none"),
    ("phi3-long", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor is missing"),
    ("phi3-long", {"num_attention_heads": 3}, "8 pairs of dimensions, but has 4 short and 4 long factors"),
    ("glm-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("glm4-plain", {"head_dim": 14, "rope_parameters": {"partial_rotary_factor": 0.5}}, "7 of 14 dimensions"),
    ("gpt2-plain", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2-plain", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2-plain", {"n_head": 7}, "n_embd 30 must be a multiple of n_head 7"),
]


@pytest.mark.parametrize(("name", "keys", "told"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, keys, told):
    with pytest.raises(UserError, match=told):
        read_config(config_of(name) | keys, name)


def test_older_and_newer_spellings_of_gemma_3_s_rotations_are_one(tmp_path):
    newer = config_of("gemma3-linear")
    rope = newer["rope_parameters"]
    older = {key: value for key, value in newer.items() if key not in ("rope_parameters", "layer_types")} | {
        "rope_theta": rope["full_attention"]["rope_theta"], "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    }  # fmt: skip
    assert read_config(older, "older")[1] == read_config(newer, "newer")[1]


def test_the_older_name_of_long_rope_is_read():
    config = config_of("phi3-long")
    older = dict(config["rope_parameters"], type="su")
    for key in ("rope_type", "original_max_position_embeddings"):
        del older[key]
    del config["rope_parameters"]
    assert read_config(config | {"rope_scaling": older}, "su")[1] == opened("phi3-long")[1]


def partly_rotated(fraction: float, head_size: int = 12) -> Place:
    attention = AttentionConfig(heads=3, kv_heads=3, head_size=head_size, rope=RopeConfig(fraction=fraction))
    block = BlockConfig(attention=attention, feed_forward=FeedForwardConfig(size=4))
    return Place(block, None, (5, 3, head_size))  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.34])
@pytest.mark.parametrize("fused", [False, True])
def test_rotating_neighbours_in_the_file_is_rotating_halves_here(fraction, fused):
    place = partly_rotated(fraction)
    form = (rows(4, 36, 43, interleaved) if fused else interleaved)(place)
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal(form.shape, np.float32)
    leaf = np.full(place.shape, np.nan, np.float32)
    read_into(leaf, form, tensor)
    x, at = rng.standard_normal((1, 4, 5), np.float32), jnp.arange(4)[None]
    table = place.block.attention.rope.table(at, 12)
    ours = rotate(jnp.einsum("btd,dnh->btnh", x, leaf), table)
    theirs = (x @ (tensor[4:40] if fused else tensor).T).reshape(1, 4, 3, 12).astype(np.complex64)
    half = table.cos.shape[-1]
    pairs = theirs[..., 0 : 2 * half : 2] + 1j * theirs[..., 1 : 2 * half : 2]
    turned = pairs * np.asarray(table.cos + 1j * table.sin)[:, :, None]
    wanted = np.concatenate([turned.real, turned.imag, theirs[..., 2 * half :].real], -1)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    back = np.full_like(tensor, np.nan)
    write_from(back, form, leaf)
    np.testing.assert_array_equal(back[4:40] if fused else back, tensor[4:40] if fused else tensor)


def test_long_rope_goes_by_each_document_s_length():
    rope = RopeConfig(
        theta=100.0, scaling="longrope", factor=4.0, original_length=5, short_factors=(1.0, 2.0),
        long_factors=(3.0, 4.0), attention_factor=2.0,
    )  # fmt: skip
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    lengths = jnp.asarray([[5] * 5 + [6] * 6])
    table = rope.table(positions, 4, lengths)
    plain = 1.0 / np.asarray([1.0, 10.0])
    for at, factors in ((4, (1.0, 2.0)), (9, (3.0, 4.0))):
        np.testing.assert_allclose(table.cos[0, at], 2.0 * np.cos(4 * plain / factors), rtol=1e-6)
    # Of itself it is sqrt(1 + ln(factor) / ln(original length)).
    free = RopeConfig(
        scaling="longrope", factor=5.0, original_length=25, short_factors=(1.0,), long_factors=(1.0,)
    )
    assert free.gain() == pytest.approx(1.5**0.5)


@pytest.mark.parametrize(
    ("layers", "stacks"),
    [
        ("LLLLLGLLLLLGLL", [("LLLLLG", 2), ("L", 2)]), ("LGLGLG", [("LG", 3)]), ("DDDMMMM", [("D", 3), ("M", 4)]),
        ("GGLG", [("G", 2), ("L", 1), ("G", 1)]), ("L", [("L", 1)]), ("LGM", [("L", 1), ("G", 1), ("M", 1)]),
    ],
)  # fmt: skip
def test_layers_become_stacks_of_repeated_patterns(layers, stacks):
    sizes = {"L": 4, "G": 5, "D": 6, "M": 7}
    kinds = {
        name: BlockConfig(
            attention=AttentionConfig(heads=1, kv_heads=1, head_size=4),
            feed_forward=FeedForwardConfig(size=size),
        )
        for name, size in sizes.items()
    }
    made = stacks_of([kinds[name] for name in layers])
    assert [(stack.pattern, stack.repeats) for stack in made] == [
        (tuple(kinds[name] for name in pattern), repeats) for pattern, repeats in stacks
    ]


def test_a_table_of_positions_is_read_like_one_of_tokens_and_cut_like_any_weight():
    _, config, _ = opened("gpt2-plain")
    config = dataclasses.replace(config, width=32, vocab_size=64, dtype="float32")
    block = config.stacks[0].pattern[0]
    attention = AttentionConfig(heads=2, kv_heads=2, head_size=16, rope=None, qkv_bias=True, output_bias=True)
    stacks = (StackConfig(pattern=(dataclasses.replace(block, attention=attention),), repeats=1),)
    model = dataclasses.replace(config, stacks=stacks).build(jax.random.key(0))
    axes = tree.axes(model)
    assert muon_dims(axes["positions.table"]) is None
    assert not decay_mask(axes, embeddings=False)["positions.table"]
    ids = jnp.arange(80).reshape(2, 40) % 64
    wanted = model(ids)
    mesh = sharding.build_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        homes = sharding.weight_shardings(mesh, axes, "parameters", 3)
        cut = tree.rebuild(
            model, {name: jax.device_put(a, homes[name]) for name, a in tree.leaves(model).items()}
        )
        assert tree.leaves(cut)["positions.table"].sharding.spec == jax.P(None, "fsdp")
        given = jax.jit(lambda model, ids: model(ids))(
            cut, jax.device_put(ids, sharding.batch_sharding(mesh))
        )
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
