"""Tiny models that together use every part, their inputs, and ways to compare them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    LayerNormConfig,
    MLAConfig,
    MoEConfig,
    RMSNormConfig,
    RopeConfig,
    StackConfig,
    Transformer,
    TransformerConfig,
    tree,
)

VOCAB, WIDTH = 64, 32
ROPE = RopeConfig(theta=100.0)
GROUPED = AttentionConfig(heads=4, kv_heads=2, head_size=8, rope=ROPE)
LATENT = MLAConfig(heads=4, kv_rank=16, q_rank=24, nope_size=8, rope_size=4, v_size=8, rope=ROPE)
GATED = FeedForwardConfig(size=48)
EXPERTS = MoEConfig(
    size=16,
    experts=4,
    experts_per_token=2,
    shared_size=16,
    scoring="sigmoid",
    routed_scale=1.5,
    bias_rate=1e-3,
)
# What EXPERTS leaves out: offsets, groups, cuts, a gate on the shared expert.
MORE_EXPERTS = MoEConfig(
    size=16, experts=4, experts_per_token=2, shared_size=16, shared_gate=True, bias=True, router_bias=True,
    activation="quick_gelu", clamp=0.7, up_offset=1.0, groups=2, group_best=2,
)  # fmt: skip


def model_config(*pattern: BlockConfig, repeats: int = 2, **fields) -> TransformerConfig:
    fields = {"dtype": "float32", "max_length": 64} | fields
    stacks = (StackConfig(pattern=pattern, repeats=repeats),)
    return TransformerConfig(vocab_size=VOCAB, width=WIDTH, stacks=stacks, **fields)


DENSE_LATENT = BlockConfig(attention=LATENT, feed_forward=GATED)
EXPERT_LATENT = BlockConfig(
    attention=dataclasses.replace(LATENT, bias=True, scale=0.4), feed_forward=MORE_EXPERTS
)

CONFIGS = {
    "grouped": model_config(BlockConfig(attention=GROUPED, feed_forward=GATED)),
    # A sliding layer after a full one; everything that GROUPED leaves out.
    "window": model_config(
        BlockConfig(
            attention=dataclasses.replace(GROUPED, window=3, softcap=3.0, qkv_bias=True, output_bias=True, sinks=True),
            feed_forward=FeedForwardConfig(size=48, activation="gelu_tanh", bias=True),
            norm=LayerNormConfig(),
        ),
        BlockConfig(
            attention=dataclasses.replace(GROUPED, qk_norm=RMSNormConfig(), qk_norm_over_heads=True),
            feed_forward=FeedForwardConfig(size=48, activation="relu2", gated=False),
            pre_norm=False,
            post_norm=True,
            residual_multiplier=0.7,
        ),
        tie_embeddings=False,
        logit_softcap=4.0,
        logit_scale=0.5,
        embedding_scale=3.0,
    ),
    "latent": model_config(BlockConfig(attention=LATENT, feed_forward=GATED)),
    "mixture": model_config(BlockConfig(attention=GROUPED, feed_forward=EXPERTS)),
    # A layer without experts before each that has some.
    "clamped mixture": model_config(DENSE_LATENT, EXPERT_LATENT),
}  # fmt: skip

# A scan over two kinds of layers that hold every kind of weight between them.
JOINED = model_config(
    CONFIGS["window"].stacks[0].pattern[0], BlockConfig(attention=LATENT, feed_forward=EXPERTS)
)

# Halves the time of compiling a gradient, which is most of what these tests take.
QUICK = {"xla_backend_optimization_level": 0}


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose weights are all random, also those that start at 0 or 1, and large enough to matter."""
    shapes = tree.leaves(tree.abstract(lambda: config.build(jax.random.key(0))))
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape.shape, np.float32)
        size = (
            0.3
            if name.endswith(("norm.scale", ".b", ".bias", "sinks", "balance"))
            else shape.shape[-2] ** -0.5
        )
        arrays[name] = jnp.asarray(
            size * values + (1.0 if "norm" in name and name.endswith("scale") else 0.0)
        )
    return tree.rebuild(tree.abstract(lambda: config.build(jax.random.key(0))), arrays)


def tokens(rows: int, length: int, seed: int = 0) -> Int[Array, "b t"]:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)
