"""Model folders in and out: what is read is what was written, on one device or more; what is wrong is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maxstack
from maxstack import sharding
from maxstack.config import UserError
from maxstack.models import presets, tree
from maxstack.models.pretrained.folder import load_folder
from maxstack.models.pretrained.reading import copy
from maxstack.models.pretrained.writing import MANIFEST
from maxstack.sharding import MeshConfig
from tests.models.families.test_parity import FIRST, LOGITS_BOUND, golden

LLAMA = "llama-llama3"


def folder_of(name: str, place: Path) -> Path:
    """A golden model as a folder."""
    place.mkdir(parents=True)
    arrays = golden(name)
    (place / "config.json").write_bytes(arrays["config"].tobytes())
    save_file(
        {key[2:]: value for key, value in arrays.items() if key.startswith("w:")}, place / "model.safetensors"
    )
    return place


def change(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture
def llama(tmp_path) -> Path:
    return folder_of(LLAMA, tmp_path / "llama")


def test_a_folder_gives_the_reference_s_logits(llama):
    model, tokenizer = maxstack.load(llama)
    assert tokenizer is None
    wanted = golden(LLAMA)["logits"]
    given = model(jnp.asarray(golden(LLAMA)["tokens"]))
    np.testing.assert_allclose(given, wanted, rtol=0, atol=LOGITS_BOUND * np.abs(wanted).max())


@pytest.mark.parametrize("name", FIRST)
def test_a_folder_read_and_written_has_the_same_tensors(name, tmp_path):
    source = folder_of(name, tmp_path / "source")
    model, _ = maxstack.load(source)
    family = json.loads((source / "config.json").read_text())["model_type"]
    manifest = maxstack.save(model, None, tmp_path / "target", dtype="float16", family=family)
    assert manifest["largest_logit_difference"] == 0.0
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("source", "target"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[key], err_msg=key)
    assert json.loads((tmp_path / "target" / MANIFEST).read_text()) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_shards_of_a_chosen_size_hold_the_same_model(llama, tmp_path):
    model, _ = maxstack.load(llama)
    maxstack.save(model, None, tmp_path / "small", shard_bytes=20_000)
    shards = list((tmp_path / "small").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    again, _ = maxstack.load(tmp_path / "small")
    for leaf, array in tree.leaves(model).items():
        np.testing.assert_array_equal(array, tree.leaves(again)[leaf])


MESHES = [MeshConfig(fsdp=2), MeshConfig(fsdp=1, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=["fsdp", "tensor", "all"])
def test_a_folder_goes_straight_into_its_shards(mesh, tmp_path):
    config = presets.llama(
        vocab_size=64, width=32, depth=3, heads=4, kv_heads=2, feed_forward=48, dtype="float32"
    )
    whole = tree.leaves(config.build(jax.random.key(0)))
    maxstack.save(config.build(jax.random.key(0)), None, tmp_path / "source")
    devices = sharding.build_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    model, _ = maxstack.load(tmp_path / "source", mesh=devices)
    held = sharding.weight_shardings(devices, tree.axes(model), "parameters", 3)
    for leaf, array in tree.leaves(model).items():
        assert array.sharding.is_equivalent_to(held[leaf], array.ndim), leaf
        np.testing.assert_array_equal(array, whole[leaf], err_msg=leaf)


def test_a_mesh_that_does_not_divide_is_refused_by_name(tmp_path):
    source = folder_of("llama-plain", tmp_path / "source")
    mesh = sharding.build_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    with pytest.raises(UserError, match="61 does not divide by mesh tensor"):
        maxstack.load(source, mesh=mesh)


def test_bfloat16_is_kept_as_it_is(llama):
    tensors = load_file(llama / "model.safetensors")
    kept = {key: jnp.asarray(value).astype(jnp.bfloat16) for key, value in tensors.items()}
    from safetensors.flax import save_file as save_flax

    save_flax(kept, llama / "model.safetensors")
    model, _ = maxstack.load(llama, dtype="bfloat16")
    assert {array.dtype for array in tree.leaves(model).values()} == {jnp.dtype(jnp.bfloat16)}
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(tree.leaves(model)["stacks.0.layers.0.feed_forward.up.w"][1], kept[name].T)


@pytest.mark.parametrize("name", [LLAMA, "deepseek3-plain"])
def test_float32_weights_of_a_model_that_computes_in_bfloat16_are_written_whole(name, tmp_path):
    """Read again in bfloat16, a router would choose other experts and a right export would be refused."""
    model, _ = maxstack.load(folder_of(name, tmp_path / "source"))
    config = dataclasses.replace(model.config, dtype="bfloat16")
    model = tree.rebuild(tree.abstract(lambda: config.build(jax.random.key(0))), tree.leaves(model))
    manifest = maxstack.save(model, None, tmp_path / "target")
    assert manifest["dtype"] == "float32"
    assert manifest["largest_logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_type": "wonder"}, "model_type 'wonder' is not supported; these are: Llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"moon_phase": 3}, "unknown moon_phase=3"),
        ({"num_attention_heads": 5}, "query heads 5 must be a multiple of kv heads 2"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', not a number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 4}, "missing model.layers.3"),
        ({"num_hidden_layers": 2}, "unexpected model.layers.2"),
        ({"intermediate_size": 40}, r"asks for \[40, 30\]|asks for \[30, 40\]|asks for \[40\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "rope_type is 'spiral'"),
    ],
)
def test_a_wrong_config_is_refused_by_name(llama, keys, told):
    change(llama, **keys)
    with pytest.raises(UserError, match=told):
        maxstack.load(llama)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(llama, content):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json|holds neither|no checkpoint"):
        load_folder(llama)


def test_integer_weights_are_refused(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is int8"):
        maxstack.load(llama)


def test_code_of_a_folder_is_reported_and_not_run(llama, caplog):
    change(llama, auto_map={"AutoModel": "evil.Model"})
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    maxstack.load(llama)
    assert "auto_map" in caplog.text


def test_an_existing_target_is_left_alone(llama, tmp_path):
    model, _ = maxstack.load(llama)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="there already"):
        maxstack.save(model, None, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_a_failing_export_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    from maxstack.models.pretrained import writing

    model, _ = maxstack.load(llama)
    wrong = jax.tree.map(lambda a: a + 1, model)
    monkeypatch.setattr(writing, "load_folder", lambda *_args, **_named: wrong)
    with pytest.raises(maxstack.config.RunError, match="nothing was kept"):
        maxstack.save(model, None, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_copying_in_tiles_copies_everything(order):
    source = np.arange(37 * 90 * 53, dtype=np.float32).reshape(37, 90, 53).transpose(order)
    target = np.zeros(source.shape, np.float32)
    copy(target, source)
    np.testing.assert_array_equal(target, source)


def test_a_name_that_stands_for_nothing_says_what_may_be_given(tmp_path):
    with pytest.raises(UserError, match='write "hf:meta/llama"'):
        maxstack.load("meta/llama")
    with pytest.raises(UserError, match="no such folder or file"):
        maxstack.load(tmp_path / "none")
