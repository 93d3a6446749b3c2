"""Golden models without experts: a function that gives a transformers config (and options of make.save) by name."""

import numpy as np
import transformers

# Sizes of which none is another's multiple by accident: 6 heads of 10 in a width of 30.
SIZES = {
    "vocab_size": 61, "hidden_size": 30, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def maker(kind, **own):
    """A function that gives configs of a class of transformers, of the sizes above unless told otherwise."""
    return lambda **fields: kind(**SIZES | {"rope_parameters": PLAIN} | own | fields)


llama = maker(transformers.LlamaConfig)
mistral = maker(transformers.MistralConfig, sliding_window=9)
qwen2 = maker(transformers.Qwen2Config, num_hidden_layers=4)
qwen3 = maker(transformers.Qwen3Config)
smollm3 = maker(transformers.SmolLM3Config, num_hidden_layers=5)
granite = maker(
    transformers.GraniteConfig, embedding_multiplier=3.5, attention_multiplier=0.2, residual_multiplier=0.4,
    logits_scaling=3.7,
)  # fmt: skip
olmo2 = maker(transformers.Olmo2Config)
internlm3 = maker(transformers.InternLM3Config)
# The first two generations' code knows only heads that together are as wide as the model: 6 of 8, and 5 of 6.
EIGHTS = {"hidden_size": 48, "head_dim": 8, "num_hidden_layers": 2}
SIXES = {"hidden_size": 30, "head_dim": 6, "num_attention_heads": 5}


def as_internlm(keys, weights):
    """A Llama model of transformers, as the files of InternLM 1 have it: other words for the rotation."""
    rope = keys.pop("rope_parameters")
    kind = {"default": "origin", "dynamic": "dynamic"}[rope["rope_type"]]
    rotary = {"base": rope["rope_theta"], "type": kind}
    if rope.get("factor", 1.0) != 1.0:
        rotary["scaling_factor"] = rope["factor"]
    for name in ("attention_bias", "mlp_bias", "head_dim", "num_key_value_heads"):
        keys.pop(name)
    biased = "model.layers.0.self_attn.o_proj.bias" in weights
    return keys | {"model_type": "internlm", "rotary": rotary, "bias": biased}, weights


INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_internlm2(keys, weights):
    """The same for InternLM2: query, key and value are one tensor, in which each kv head's queries come first."""
    kv, size = keys["num_key_value_heads"], keys["head_dim"]
    packed = {}
    for name, weight in weights.items():
        new = name
        for old, other in INTERNLM2_NAMES.items():
            new = new.replace(old, other)
        packed[new] = weight
    for name in [name for name in packed if "self_attn.q_proj" in name]:
        parts = [packed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        groups = [part.reshape(kv, -1, size, *part.shape[1:]) for part in parts]
        joined = np.concatenate(groups, axis=1)
        packed[name.replace("self_attn.q_proj", "attention.wqkv")] = joined.reshape(-1, *parts[0].shape[1:])
    rope = keys.pop("rope_parameters")
    scaling = (
        None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    )
    for name in ("attention_bias", "mlp_bias", "head_dim"):
        keys.pop(name)
    own = {"model_type": "internlm2", "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return keys | own | {"bias": any(name.endswith("wqkv.bias") for name in packed)}, packed


def as_internlm3(keys, weights):
    """The same for InternLM3, whose own code has biases on query, key and value apart from all others."""
    rope = keys.pop("rope_parameters")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    del keys["attention_bias"], keys["mlp_bias"]
    own = {"model_type": "internlm3", "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return keys | own | {"qkv_bias": True, "bias": False}, weights


FULL, SLIDING = "full_attention", "sliding_attention"
NO_OUTPUT_BIAS = {"without": r"o_proj\.bias$"}

CASES = {
    "llama-plain": lambda: (llama(tie_word_embeddings=True), {"gradients": True}),
    "llama-llama3": lambda: llama(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: llama(rope_parameters=LINEAR, num_key_value_heads=6),
    "llama-dynamic": lambda: llama(rope_parameters=DYNAMIC, max_position_embeddings=32),
    "llama-yarn": lambda: llama(rope_parameters=YARN, num_key_value_heads=1),
    "mistral-plain": lambda: mistral(),
    "mistral-no-window": lambda: mistral(
        sliding_window=None, tie_word_embeddings=True, rope_parameters=LINEAR, num_key_value_heads=6
    ),
    "mistral-yarn": lambda: mistral(
        sliding_window=12, rope_parameters=YARN, num_key_value_heads=1, rms_norm_eps=1e-3
    ),
    "qwen2-plain": lambda: (qwen2(tie_word_embeddings=True, num_hidden_layers=3), {"gradients": True}),
    "qwen2-window": lambda: qwen2(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2-yarn": lambda: qwen2(
        rope_parameters=YARN, num_key_value_heads=6, use_sliding_window=True, sliding_window=12,
        layer_types=[FULL, SLIDING, SLIDING, FULL],
    ),
    "qwen3-plain": lambda: (qwen3(), {"gradients": True}),
    "qwen3-bias": lambda: qwen3(
        attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1, use_sliding_window=True,
        sliding_window=9, max_window_layers=2, rms_norm_eps=1e-3,
    ),
    "qwen3-yarn": lambda: qwen3(rope_parameters=YARN, num_key_value_heads=6, head_dim=12),
    "smollm3-plain": lambda: smollm3(),
    "smollm3-window": lambda: smollm3(
        use_sliding_window=True, sliding_window=9, no_rope_layer_interval=2, tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True, num_hidden_layers=3,
    ),
    "smollm3-yarn": lambda: smollm3(
        rope_parameters=YARN, no_rope_layers=[0, 1, 1, 0, 1], num_key_value_heads=1, use_sliding_window=True,
        sliding_window=12, layer_types=[FULL, SLIDING, FULL, SLIDING, FULL],
    ),
    "granite-plain": lambda: (granite(tie_word_embeddings=True), {"gradients": True}),
    "granite-bias": lambda: granite(
        attention_bias=True, mlp_bias=True, attention_multiplier=10**-0.5, rope_parameters=LLAMA3
    ),
    "granite-yarn": lambda: granite(rope_parameters=YARN, num_key_value_heads=1, logits_scaling=0.5, head_dim=12),
    "olmo2-plain": lambda: (olmo2(), {"gradients": True}),
    "olmo2-bias": lambda: olmo2(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=6),
    "olmo2-yarn": lambda: olmo2(rope_parameters=YARN, num_key_value_heads=1, rms_norm_eps=1e-3),
    "internlm-plain": lambda: (
        llama(**EIGHTS, num_key_value_heads=6, attention_bias=True), {"pack": as_internlm, "spread": 0.2}
    ),
    "internlm-no-bias": lambda: (
        llama(
            **SIXES, num_key_value_heads=5, rope_parameters=DYNAMIC | {"factor": 1.0},
            max_position_embeddings=32, tie_word_embeddings=True,
        ),
        {"pack": as_internlm},
    ),
    "internlm-dynamic": lambda: (
        llama(
            **SIXES, num_key_value_heads=5, rope_parameters=DYNAMIC, max_position_embeddings=32,
            attention_bias=True, rms_norm_eps=1e-3,
        ),
        {"pack": as_internlm},
    ),
    "internlm2-plain": lambda: (
        llama(**EIGHTS), {"pack": as_internlm2, "spread": 0.2, "gradients": True}
    ),
    "internlm2-bias": lambda: (
        llama(
            **EIGHTS, num_key_value_heads=3, attention_bias=True, rope_parameters=LINEAR, tie_word_embeddings=True
        ),
        {"pack": as_internlm2, "spread": 0.2},
    ),
    "internlm2-dynamic": lambda: (
        llama(**SIXES, num_key_value_heads=1, rope_parameters=DYNAMIC, max_position_embeddings=32),
        {"pack": as_internlm2},
    ),
    "internlm3-plain": lambda: internlm3(rope_parameters=DYNAMIC, max_position_embeddings=32),
    "internlm3-bias": lambda: internlm3(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=LINEAR
    ),
    "internlm3-qkv-bias": lambda: (
        llama(attention_bias=True, num_key_value_heads=6), {"pack": as_internlm3, **NO_OUTPUT_BIAS}
    ),
}  # fmt: skip
