"""What is exported opens in transformers on PyTorch with equal logits, for every golden model.

Needs a Python with torch and transformers, named by MAXSTACK_TORCH_PYTHON; `make test-oracle PYTHON_TORCH=…` runs it.
"""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import maxstack
from tests.models.families.test_parity import NAMES, golden
from tests.models.pretrained.test_folder import folder_of

PYTHON = os.environ.get("MAXSTACK_TORCH_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not PYTHON, reason="set MAXSTACK_TORCH_PYTHON to a Python with torch and transformers"
    ),
]
BOUND = 2e-4
"""Of the largest logit: float32 sums in another order."""
# Opened by classes that transformers does not have itself.
FOREIGN = ("internlm", "internlm2", "internlm3")
SCRIPT = """
import json, sys
import numpy as np, torch, transformers
EAGER = dict(attn_implementation="eager", experts_implementation="eager")  # others want rows of 16 bytes
for line in sys.stdin:
    folder, tokens = json.loads(line)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits
    np.save(folder + "/logits.npy", logits.float().numpy())
"""


def test_every_export_has_the_same_logits_in_transformers(tmp_path):
    asked, ours = [], {}
    for name in NAMES:
        source = folder_of(name, tmp_path / name / "source")
        kind = json.loads((source / "config.json").read_text())["model_type"]
        if kind in FOREIGN:
            continue
        model, _ = maxstack.load(source)
        target = tmp_path / name / "target"
        maxstack.save(model, None, target, family=kind)
        ours[name] = np.asarray(model(jnp.asarray(golden(name)["tokens"])))
        asked.append(json.dumps([str(target), golden(name)["tokens"].tolist()]))
    subprocess.run(
        [str(PYTHON), "-c", SCRIPT], input="\n".join(asked), text=True, check=True, capture_output=True
    )
    worst = {}
    for name, logits in ours.items():
        theirs = np.load(Path(tmp_path) / name / "target" / "logits.npy")
        worst[name] = float(np.abs(theirs - logits).max() / np.abs(theirs).max())
    assert max(worst.values()) < BOUND, worst
    print(json.dumps(worst))
