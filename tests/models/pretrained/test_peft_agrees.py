"""Adapters that PEFT makes on PyTorch give the same logits here, their factors merged into our weights.

Needs a Python with torch, transformers and peft, named by MAXSTACK_TORCH_PYTHON.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import maxstack
from maxstack.models import tree
from maxstack.models.adapters import AdapterSlots, merged
from maxstack.models.peft import read_peft
from maxstack.serve.rooms import names
from tests.models.tiny import CONFIGS, build

PYTHON = os.environ.get("MAXSTACK_TORCH_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not PYTHON, reason="set MAXSTACK_TORCH_PYTHON to a Python with torch, transformers and peft"
    ),
]
BOUND = 2e-4
"""Of the largest logit: float32 sums in another order."""
SCRIPT = """
import json, sys
import numpy as np, peft, torch, transformers
for line in sys.stdin:
    folder, target, settings, tokens = json.loads(line)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    with torch.no_grad():
        np.save(target + ".npy", model(torch.tensor(tokens)).logits.float().numpy())
    model.save_pretrained(target)
"""
CASES = {
    "all linear": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
    "patterns and rslora": ("llama", {
        "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 9},
    }),
    "fused": ("phi3", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
}  # fmt: skip


def test_an_adapter_of_peft_gives_its_logits(tmp_path):
    if subprocess.run([str(PYTHON), "-c", "import peft"], check=False, capture_output=True).returncode:
        pytest.skip("the Python that MAXSTACK_TORCH_PYTHON names has no peft")
    config = dataclasses.replace(CONFIGS["grouped"], tie_embeddings=False)
    model, tokens = build(config), np.random.default_rng(3).integers(0, 64, (2, 17))
    asked = []
    for family in {family for family, _ in CASES.values()}:
        maxstack.save(model, None, tmp_path / family, family=family)
    for name, (family, settings) in CASES.items():
        asked.append(json.dumps([str(tmp_path / family), str(tmp_path / name), settings, tokens.tolist()]))
    given = "\n".join(asked)
    done = subprocess.run(
        [str(PYTHON), "-c", SCRIPT], check=False, input=given, text=True, capture_output=True
    )
    assert not done.returncode, done.stderr
    plain = np.asarray(model(jnp.asarray(tokens)))
    for name in CASES:
        folder = Path(tmp_path) / name
        arrays = dict(tree.leaves(model))
        for (stack, place, repeat, part), own in read_peft(
            folder, config, names(model, AdapterSlots()), 8
        ).items():
            leaf = f"stacks.{stack}.layers.{place}.{part}.w"
            arrays[leaf] = arrays[leaf].at[repeat].set(merged(arrays[leaf][repeat], own))
        theirs = np.load(f"{folder}.npy")
        ours = np.asarray(tree.rebuild(model, arrays)(jnp.asarray(tokens)))
        assert np.abs(theirs - plain).max() > 0.1 * np.abs(theirs).max()  # the adapter matters
        assert np.abs(ours - theirs).max() < BOUND * np.abs(theirs).max(), name
