"""Golden models that differ more from Llama: a function that gives a transformers config (and options) by name."""

import transformers

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Six heads of 10 in a width of 30: no size is another's by accident.
SIZES = {
    "vocab_size": 61, "hidden_size": 30, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, **NO_TOKENS,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SLIDING = {"sliding_window": 9, "query_pre_attn_scalar": 7}


def gemma(**fields):
    return transformers.GemmaConfig(**SIZES | {"rope_parameters": dict(PLAIN)} | fields)


def gemma2(**fields):
    own = {"rope_parameters": dict(PLAIN), "num_hidden_layers": 4, **SLIDING}
    return transformers.Gemma2Config(**SIZES | own | fields)


def gemma3(full=PLAIN | {"rope_theta": 1000.0}, **fields):
    rope = {"full_attention": dict(full), "sliding_attention": dict(PLAIN)}
    own = {
        "rope_parameters": rope,
        "num_hidden_layers": 7,
        "intermediate_size": 22,
        "sliding_window_pattern": 3,
    }
    return transformers.Gemma3TextConfig(**SIZES | SLIDING | own | fields)


# The reference checks the number of factors against width / heads, so these models have heads of that size.
LONG_SIZES = {**SIZES, "hidden_size": 48}
del LONG_SIZES["head_dim"]


def phi3(original=64, **fields):
    own = {"rope_parameters": dict(PLAIN), "original_max_position_embeddings": original}
    return transformers.Phi3Config(**LONG_SIZES | own | fields)


def longrope(*, fraction=1.0, **more):
    pairs = int(8 * fraction) // 2
    return {
        "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": fraction,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [1.5 + 0.75 * i for i in range(pairs)],
        **more,
    }  # fmt: skip


def glm(kind=transformers.GlmConfig, rope=PLAIN, fraction=0.5, **fields):
    rope = {**rope, "partial_rotary_factor": fraction}
    return kind(**SIZES | {"head_dim": 12, "rope_parameters": rope, **NO_TOKENS} | fields)


def glm4(**fields):
    return glm(transformers.Glm4Config, **fields)


def gpt2(**fields):
    own = {"vocab_size": 61, "n_positions": 48, "n_embd": 30, "n_layer": 3, "n_head": 6, **NO_TOKENS}
    return transformers.GPT2Config(**own | fields)


AROUND_ONE = {"norm": 0.0}
"""Gemma's norms add 1 to what is stored."""
MILD = {"spread": 0.2}
"""For wider models, whose attention would be so sharp that rounding decides it."""
FIRST_FULL = ["full_attention", "full_attention", "sliding_attention", "full_attention"]

CASES = {
    "gemma-plain": lambda: (gemma(), {"gradients": True, **AROUND_ONE}),
    "gemma-bias": lambda: (
        gemma(attention_bias=True, num_key_value_heads=6, tie_word_embeddings=False), AROUND_ONE
    ),
    "gemma-llama3": lambda: (
        gemma(rope_parameters=LLAMA3, num_key_value_heads=1, rms_norm_eps=1e-3), AROUND_ONE
    ),
    "gemma2-plain": lambda: (gemma2(), AROUND_ONE),
    "gemma2-odd": lambda: (
        gemma2(
            num_hidden_layers=3, attention_bias=True, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            query_pre_attn_scalar=10, tie_word_embeddings=False,
        ),
        AROUND_ONE,
    ),
    "gemma2-yarn": lambda: (
        gemma2(
            rope_parameters=YARN, attn_logit_softcapping=None, final_logit_softcapping=None, num_key_value_heads=1,
            layer_types=FIRST_FULL,
        ),
        AROUND_ONE,
    ),
    "gemma3-plain": lambda: (gemma3(), AROUND_ONE),
    "gemma3-linear": lambda: (
        gemma3(full=LINEAR, num_hidden_layers=6, tie_word_embeddings=False, final_logit_softcapping=3.0), AROUND_ONE
    ),
    "gemma3-bias": lambda: (
        gemma3(num_hidden_layers=2, attention_bias=True, num_key_value_heads=6, sliding_window=12), AROUND_ONE
    ),
    "phi3-plain": lambda: (phi3(sliding_window=9), MILD),
    "phi3-head-size": lambda: (phi3(head_dim=6, tie_word_embeddings=True, num_key_value_heads=6), MILD),
    "phi3-long": lambda: (phi3(original=16, rope_parameters=longrope(), num_key_value_heads=3), MILD),
    "phi3-short": lambda: (
        phi3(
            original=41, max_position_embeddings=164, rope_parameters=longrope(fraction=0.75), tie_word_embeddings=True
        ),
        MILD,
    ),
    "phi3-gain": lambda: (
        phi3(original=16, rope_parameters=longrope(attention_factor=1.3), num_hidden_layers=2), MILD
    ),
    "glm-plain": lambda: glm(),
    "glm-no-bias": lambda: glm(attention_bias=False, tie_word_embeddings=True, fraction=1.0, num_key_value_heads=6),
    "glm-quarter": lambda: glm(rope=LINEAR, fraction=0.34, rms_norm_eps=1.5625e-7, num_key_value_heads=1),
    "glm4-plain": lambda: (glm4(num_hidden_layers=2), {"gradients": True}),
    "glm4-no-bias": lambda: glm4(attention_bias=False, tie_word_embeddings=True, fraction=0.67),
    "glm4-yarn": lambda: glm4(rope=YARN, num_key_value_heads=3),
    "gpt2-plain": lambda: (gpt2(n_layer=2), {"gradients": True}),
    "gpt2-inner": lambda: gpt2(n_inner=50, n_head=3, n_embd=24, layer_norm_epsilon=1e-3, tie_word_embeddings=False),
    "gpt2-one-head": lambda: gpt2(n_head=1, n_embd=14, n_positions=40, activation_function="gelu"),
}  # fmt: skip
