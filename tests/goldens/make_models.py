"""Makes the golden models of tests/models/test_goldens.py with the reference implementation of transformers.

Run by hand, in an environment with torch and transformers (made with torch 2.13 and transformers 5.23):

    python tests/goldens/make_models.py

Each file holds a tiny model with random weights: the weights under their names in transformers ("w:<name>", float16,
to which they were rounded before use), tokens and float32 logits.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

FOLDER = Path(__file__).parent
LENGTH = 48

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "attn_implementation": "eager",
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# The four length scalings, all with sequences longer than the original context and wavelengths on both sides of it.
ROPES = {
    "llama_llama3": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "llama_linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama_dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "llama_yarn": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def configs():
    """The models by file name."""
    plain = {"rope_type": "default", "rope_theta": 100.0}
    for name, rope in ROPES.items():
        # Dynamic scaling begins past max_position_embeddings; the others name their original context.
        longest = 32 if rope["rope_type"] == "dynamic" else 128
        yield (
            name,
            transformers.LlamaConfig(**SIZES | {"max_position_embeddings": longest}, rope_parameters=rope),
        )
    yield "qwen2", transformers.Qwen2Config(**SIZES, rope_parameters=plain, tie_word_embeddings=True)
    yield "qwen3", transformers.Qwen3Config(**SIZES, rope_parameters=plain)
    yield (
        "gemma2",
        transformers.Gemma2Config(
            **SIZES | {"num_hidden_layers": 4}, rope_parameters=plain, sliding_window=8, query_pre_attn_scalar=12,
            attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
        ),
    )  # fmt: skip
    olmo = {name: value for name, value in SIZES.items() if name != "head_dim"}
    yield "olmo2", transformers.Olmo2Config(**olmo, rope_parameters=plain)
    yield (
        "mixtral",
        transformers.MixtralConfig(
            **SIZES, rope_parameters=plain, num_local_experts=4, num_experts_per_tok=2
        ),
    )
    latent = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
    yield (
        "deepseek_v3",
        transformers.DeepseekV3Config(
            **latent, num_key_value_heads=4, rope_parameters=plain, kv_lora_rank=12, q_lora_rank=10,
            qk_rope_head_dim=8, qk_nope_head_dim=6,
            v_head_dim=10, n_group=1, topk_group=1, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2,
            moe_intermediate_size=12, first_k_dense_replace=1, routed_scaling_factor=2.5, num_mtp_layers=0,
        ),
    )  # fmt: skip


def fill(module: torch.nn.Module, rng: np.random.Generator, *, norm: float) -> dict[str, np.ndarray]:
    """Random weights, large enough for every part to matter; returns them, as float16."""
    stored = {}
    for name, tensor in module.state_dict().items():
        values = rng.standard_normal(tuple(tensor.shape))
        if "norm" in name:
            values = norm + 0.2 * values
        elif tensor.ndim == 1:
            values = 0.3 * values
        elif "embed_tokens" not in name:
            values = 1.5 * values / np.sqrt(tensor.shape[-1])
        stored[f"w:{name}"] = values.astype(np.float16)
        tensor.copy_(torch.from_numpy(stored[f"w:{name}"].astype(np.float32)))
    return stored


@torch.no_grad()
def make_model(name: str, config: transformers.PreTrainedConfig) -> None:
    rng = np.random.default_rng(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Gemma's norms add the stored scale to 1. A tied head is the embedding again, and takes its values.
    stored = fill(model, rng, norm=0.0 if name == "gemma2" else 1.0)
    if config.tie_word_embeddings:
        tied = stored.pop("w:lm_head.weight")
        stored["w:model.embed_tokens.weight"] = tied
    tokens = rng.integers(0, config.vocab_size, (2, LENGTH))
    logits = model(input_ids=torch.from_numpy(tokens)).logits
    save(name, stored, tokens=tokens.astype(np.int32), logits=logits.numpy())


@torch.no_grad()
def make_sinks() -> None:
    """The two attention layers of GPT-OSS (a sliding and a full one) alone: x in, y out."""
    rng = np.random.default_rng(1)
    config = transformers.GptOssConfig(
        **SIZES, sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    )
    x = torch.from_numpy(rng.standard_normal((2, LENGTH, 16)).astype(np.float32))
    positions = torch.arange(LENGTH)[None]
    distance = positions[0][:, None] - positions[0][None, :]
    tables = GptOssRotaryEmbedding(config)(x, positions)
    arrays = {"x": x.numpy()}
    for index, window in enumerate((8, LENGTH)):
        layer = GptOssAttention(config, index).eval()
        hidden = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf)[None, None]
        stored = fill(layer, rng, norm=1.0)
        arrays |= {f"{weight}.{index}": values for weight, values in stored.items()}
        arrays[f"y.{index}"] = layer(x, tables, hidden)[0].numpy()
    save("gpt_oss_attention", arrays)


def save(name: str, stored: dict[str, np.ndarray], **arrays: np.ndarray) -> None:
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **stored, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {len(stored)} weights")


if __name__ == "__main__":
    for name, config in configs():
        make_model(name, config)
    make_sinks()
