"""Adapters of PEFT as factors of our weights, in every family's way of laying out tensors."""

import dataclasses
import json

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.adapters import AdapterSlots, merged
from maxstack.models.families import family_for
from maxstack.models.peft import read_peft
from maxstack.serve.rooms import names
from tests.models.lora import matrices, save, with_deltas, write_adapter
from tests.models.tiny import CONFIGS, build

CONFIG = dataclasses.replace(CONFIGS["grouped"], tie_embeddings=False)


def check_merged(model, folder, deltas, family=None):
    """Factors in our shapes give the weights that the file's tensors give with their deltas."""
    adapter = read_peft(folder, model.config, names(model, AdapterSlots()), 8)
    wanted, given = tree.leaves(with_deltas(model, deltas, family)), dict(tree.leaves(model))
    for (stack, place, repeat, name), own in adapter.items():
        leaf = f"stacks.{stack}.layers.{place}.{name}.w"
        given[leaf] = given[leaf].at[repeat].set(merged(given[leaf][repeat], own))
    for leaf, array in wanted.items():
        np.testing.assert_allclose(np.asarray(given[leaf]), np.asarray(array), atol=1e-6, err_msg=leaf)
    assert adapter


@pytest.mark.parametrize("family", ["llama", "internlm2", "phi3"])
def test_factors_are_those_of_the_files_tensors_also_where_they_are_fused(tmp_path, family):
    model = build(CONFIG)
    own = {
        m.removesuffix(".weight").rpartition(".")[2]
        for m in matrices(family_for(CONFIG, prefer=family), model)
    }
    targets = own - {"embed_tokens", "tok_embeddings", "lm_head", "output"}
    folder, deltas = write_adapter(tmp_path, model, targets=targets, family=family)
    assert {source.removesuffix(".weight").rpartition(".")[2] for source in deltas} == targets
    check_merged(model, folder, deltas, family)


def test_settings_scale_each_module(tmp_path):
    model = build(CONFIG)
    folder, deltas = write_adapter(
        tmp_path, model, rank=2, ranks={"mlp.down_proj": 5}, use_rslora=True, lora_alpha=3, target_modules="all-linear"
    )  # fmt: skip
    check_merged(model, folder, deltas)


@pytest.mark.parametrize(("settings", "part"), [
    ({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"peft_type": "IA3"}, "'IA3'; only LORA"), ({"init_lora_weights": "pissa_niter_4"}, "base model itself"),
    ({"r": 0}, "r is 0"), ({"r": 10**6}, "1 to 512"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern"), ({"target_parameters": ["experts"]}, "experts"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_refused_in_words(tmp_path, settings, part):
    model = build(CONFIG)
    folder, _ = write_adapter(tmp_path, model)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    with pytest.raises(UserError, match=part.replace("(", r"\(")):
        read_peft(folder, CONFIG, names(model, AdapterSlots()), 8)


def test_tensors_that_are_no_factors_of_this_model_are_refused_by_name(tmp_path):
    model = build(CONFIG)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    good = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    for written, part in (
        ({f"{good}A.weight": a}, "only one of"), ({f"{good}A.weight": a, f"{good}B.weight": b.T}, r"not \[32, 2\]"),
        ({f"{good}A.weight": a, f"{good}B.weight": b * np.nan}, "not finite"),
        ({f"{good}A.weight": a, f"{good}B.weight": b, f"{good}magnitude_vector": b}, "magnitude_vector is no factor"),
        ({n.replace("layers.0", "layers.9"): x for n, x in ((f"{good}A.weight", a), (f"{good}B.weight", b))},
         "no module model.layers.9"),
        ({f"base_model.model.lm_head.lora_{n}.weight": x for n, x in (("A", a), ("B", np.ones((64, 2), np.float32)))},
         "lm_head is not served"),
    ):  # fmt: skip
        save(tmp_path / part[:9].replace(" ", "_"), values, written)
        with pytest.raises(UserError, match=part):
            read_peft(tmp_path / part[:9].replace(" ", "_"), CONFIG, names(model, AdapterSlots()), 8)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "p" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle"):
        read_peft(tmp_path / "p", CONFIG, names(model, AdapterSlots()), 8)
