"""Makes tests/goldens/arcee, the tiny model on which docs/extend.md shows how a family is added.

Run by hand in an environment with torch and transformers (made with torch 2.13 and transformers 5.23):

    python tests/goldens/make_arcee.py
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "arcee"

torch.manual_seed(0)
config = transformers.ArceeConfig(
    vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, rms_norm_eps=1e-3, bos_token_id=None,
    eos_token_id=None, attn_implementation="eager",
    rope_parameters={
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 8.0, "beta_slow": 1.0,
    },
)  # fmt: skip
model = transformers.ArceeForCausalLM(config).eval()
with torch.no_grad():
    for name, weight in model.named_parameters():
        weight.copy_((torch.randn_like(weight) * 0.3 + ("norm" in name)).half().float())
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    logits = model(tokens).logits
# The weights were rounded to float16, so that the file loses nothing.
model.half().save_pretrained(FOLDER)
(FOLDER / "generation_config.json").unlink(missing_ok=True)
np.savez_compressed(FOLDER / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
