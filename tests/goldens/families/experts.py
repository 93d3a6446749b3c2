"""Golden models with experts: a function that gives a transformers config (and options of make.save) by name."""

import transformers

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Five heads of 6, or six over three kv heads, in a width of 20: no size is another's by accident.
SIZES = {
    "vocab_size": 61, "hidden_size": 20, "intermediate_size": 14, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 64, **NO_TOKENS,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def mixtral(**fields):
    own = {"rope_parameters": dict(PLAIN), "num_local_experts": 5, "num_experts_per_tok": 2}
    return transformers.MixtralConfig(**SIZES | own | fields)


QWEN = {
    "rope_parameters": dict(PLAIN), "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
    "intermediate_size": 22,
}  # fmt: skip


def qwen2(**fields):
    own = {"shared_expert_intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return transformers.Qwen2MoeConfig(**sizes | QWEN | own | {"hidden_size": 24} | fields)


def qwen3(**fields):
    return transformers.Qwen3MoeConfig(**SIZES | QWEN | fields)


LATENT = {
    "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 10, "q_lora_rank": 11, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8, "v_head_dim": 7, "moe_intermediate_size": 10, "n_routed_experts": 6,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "intermediate_size": 22,
}  # fmt: skip


def deepseek(kind, **fields):
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return kind(**sizes | LATENT | {"rope_parameters": dict(PLAIN)} | fields)


def v2(**fields):
    return deepseek(transformers.DeepseekV2Config, **fields)


def v3(**fields):
    own = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
    return deepseek(transformers.DeepseekV3Config, **own | fields)


def with_mscale(mscale, all_dims):
    return YARN | {"mscale": mscale, "mscale_all_dim": all_dims}


def gpt_oss(**fields):
    own = {
        "rope_parameters": YARN | {"truncate": False}, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 7, "num_hidden_layers": 4,
    }  # fmt: skip
    return transformers.GptOssConfig(**SIZES | own | fields)


CASES = {
    "mixtral-plain": lambda: (mixtral(num_hidden_layers=2), {"gradients": True}),
    "mixtral-window": lambda: mixtral(sliding_window=9, tie_word_embeddings=True, num_key_value_heads=1),
    "mixtral-linear": lambda: mixtral(rope_parameters=LINEAR, num_key_value_heads=6, num_experts_per_tok=3),
    "qwen2moe-plain": lambda: (qwen2(num_hidden_layers=2), {"gradients": True}),
    "qwen2moe-dense-layers": lambda: qwen2(
        num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True, tie_word_embeddings=True
    ),
    "qwen2moe-window": lambda: qwen2(
        use_sliding_window=True, sliding_window=9, qkv_bias=False, rope_parameters=YARN, num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3moe-plain": lambda: qwen3(norm_topk_prob=True),
    "qwen3moe-dense-layers": lambda: qwen3(
        num_hidden_layers=4, mlp_only_layers=[0, 2], attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3moe-window": lambda: qwen3(
        use_sliding_window=True, sliding_window=9, rope_parameters=YARN, num_key_value_heads=1, norm_topk_prob=True
    ),
    "deepseek2-plain": lambda: v2(q_lora_rank=None, routed_scaling_factor=1.5, rms_norm_eps=1e-3),
    "deepseek2-groups": lambda: v2(
        topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=16.0, num_hidden_layers=4,
        rope_parameters=with_mscale(0.707, 0.707), first_k_dense_replace=2,
    ),
    "deepseek2-bias": lambda: v2(
        attention_bias=True, rope_parameters=with_mscale(0.8, 1.1), tie_word_embeddings=True, first_k_dense_replace=0
    ),
    "deepseek3-plain": lambda: (v3(), {"gradients": True}),
    "deepseek3-yarn": lambda: v3(
        rope_parameters=with_mscale(1.0, 1.0), n_group=2, topk_group=1, attention_bias=True, first_k_dense_replace=2,
        rms_norm_eps=1e-3,
    ),
    "deepseek3-one-group": lambda: v3(
        n_group=1, topk_group=1, norm_topk_prob=False, q_lora_rank=None, rope_parameters=YARN,
        tie_word_embeddings=True, routed_scaling_factor=1.0,
    ),
    "gptoss-plain": lambda: (gpt_oss(), {"gradients": True}),
    "gptoss-no-bias": lambda: gpt_oss(
        attention_bias=False, tie_word_embeddings=True, num_key_value_heads=1, swiglu_limit=0.5,
        rope_parameters=YARN, num_hidden_layers=2,
    ),
    "gptoss-full-first": lambda: gpt_oss(
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], num_hidden_layers=3,
        rope_parameters=PLAIN, num_key_value_heads=6, num_experts_per_tok=1,
    ),
}  # fmt: skip
