"""Mixtral (arXiv:2401.04088), Qwen2-MoE (2407.10671) and Qwen3-MoE (2505.09388): Llama's layers with routed experts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope, stacks_of
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.qwen import QK_NORMS
from maxstack.models.families.weights import Form, Place, Special, Table
from maxstack.models.families.windows import read_windows, window_keys
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.moe import MoEConfig
from maxstack.models.transformer import TransformerConfig

NO_BALANCE = ("feed_forward.balance",)
"""Routers without a balancing bias keep ours at 0."""


def one_row(place: Place) -> Form:
    """A vector that the file holds as the only row of a matrix."""
    return Form((1, *place.shape), lambda a: a[0])


def experts_table(shared: str) -> Table:
    """Router and experts, a tensor each, beside Llama's; `shared` is what the shared expert is called."""
    mlp = LAYER + "mlp."
    return {
        **TABLE,
        "feed_forward.router": mlp + "gate.weight",
        **{f"feed_forward.{p}": mlp + "experts.{expert}." + f"{p}_proj.weight" for p in ("gate", "up", "down")},
        **{f"feed_forward.shared.{p}.w": f"{mlp}{shared}.{p}_proj.weight" for p in ("gate", "up", "down")},
    }  # fmt: skip


QWEN2_TABLE: Table = {
    **experts_table("shared_expert"),
    "feed_forward.shared_gate": Special(LAYER + "mlp.shared_expert_gate.weight", one_row),
}
QWEN3_TABLE: Table = {**experts_table("shared_expert"), **QK_NORMS}
MIXTRAL_TABLE: Table = {
    **TABLE,
    "feed_forward.router": LAYER + "block_sparse_moe.gate.weight",
    **{
        f"feed_forward.{part}": LAYER + "block_sparse_moe.experts.{expert}." + f"{name}.weight"
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}


def norm_of(keys: Keys, eps: float) -> RMSNormConfig:
    """The norm of the residual stream."""
    return RMSNormConfig(eps=float(keys.number("rms_norm_eps", eps)))


def mixtral(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    attention = AttentionConfig(
        **sizes(keys), rope=read_rope(keys, theta=1e6), window=keys.whole("sliding_window", None)
    )
    experts = MoEConfig(
        size=keys.whole("intermediate_size"), experts=keys.whole("num_local_experts", 8),
        experts_per_token=keys.whole("num_experts_per_tok", 2), auxiliary_loss=auxiliary(keys),
    )  # fmt: skip
    return model(keys, BlockConfig(attention=attention, feed_forward=experts, norm=norm_of(keys, 1e-5)))


def auxiliary(keys: Keys, default: float = 0.001) -> float:
    """Weight of the balancing loss in training. Here it is that of each layer's mean, there of all layers' together."""
    return float(keys.number("router_aux_loss_coef", default))


def with_experts(keys: Keys) -> list[bool]:
    """Which layers have experts; the others are dense."""
    step, dense = keys.whole("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    layers = keys.whole("num_hidden_layers")
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise UserError(
            f"{keys.where}: {keys.path}mlp_only_layers is {dense!r}, not a list of layers' numbers"
        )
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def qwen_blocks(
    keys: Keys, attentions: Sequence[AttentionConfig], experts: MoEConfig
) -> tuple[BlockConfig, ...]:
    """The layers, each with its own attention, dense or with experts."""
    keys.expect("hidden_act", "silu")
    norm, sparse = norm_of(keys, 1e-6), with_experts(keys)
    keys.skip("intermediate_size")  # when all have experts
    dense = experts if all(sparse) else FeedForwardConfig(size=keys.whole("intermediate_size"))
    return tuple(
        BlockConfig(attention=attention, feed_forward=experts if has else dense, norm=norm)
        for attention, has in zip(attentions, sparse, strict=True)
    )


def qwen_experts(keys: Keys, *, size: int, experts: int, experts_per_token: int) -> dict[str, Any]:
    """What the experts of both have in common; the sizes are those of a config.json that does not say them."""
    # Newer transformers write the second name.
    count = keys.whole("num_experts", keys.whole("num_local_experts", experts))
    keys.expect("num_local_experts", count)
    return {
        "size": keys.whole("moe_intermediate_size", size), "experts": count,
        "experts_per_token": keys.whole("num_experts_per_tok", experts_per_token),
        "normalize": keys.flag("norm_topk_prob", False), "auxiliary_loss": auxiliary(keys),
    }  # fmt: skip


def qwen2_moe(keys: Keys) -> TransformerConfig:
    attention = AttentionConfig(**sizes(keys), rope=read_rope(keys), qkv_bias=keys.flag("qkv_bias", True))
    experts = MoEConfig(
        **qwen_experts(keys, size=1408, experts=60, experts_per_token=4), shared_gate=True,
        shared_size=keys.whole("shared_expert_intermediate_size", 5632),
    )  # fmt: skip
    attentions = [dataclasses.replace(attention, window=window) for window in qwen2_moe_windows(keys)]
    blocks = qwen_blocks(keys, attentions, experts)
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def qwen2_moe_windows(keys: Keys) -> list[int | None]:
    """Each layer's window. Which layers it is meant for without a list has changed over time, so that is refused."""
    if keys.flag("use_sliding_window", False) and "layer_types" not in keys:
        raise UserError(
            f"{keys.where}: {keys.path}use_sliding_window needs layer_types, which says what layers have a window"
        )
    return read_windows(keys)


def qwen3_moe(keys: Keys) -> TransformerConfig:
    bias = keys.flag("attention_bias", False)
    windowed = keys.flag("use_sliding_window", False)  # all layers or none
    window = keys.whole("sliding_window", 4096) if windowed else None
    keys.skip("max_window_layers", "sliding_window")
    attention = AttentionConfig(
        **sizes(keys), rope=read_rope(keys), qk_norm=norm_of(keys, 1e-6), qkv_bias=bias, output_bias=bias,
        window=window,
    )  # fmt: skip
    experts = MoEConfig(**qwen_experts(keys, size=768, experts=128, experts_per_token=8))
    blocks = qwen_blocks(keys, [attention] * keys.whole("num_hidden_layers"), experts)
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def mixtral_keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    moe = block.feed_forward
    return common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": moe.size, "sliding_window": block.attention.window,
        "num_local_experts": moe.experts, "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.auxiliary_loss,
    }  # fmt: skip


def layers_of[T](config: TransformerConfig, kind: type[T]) -> list[T]:
    """The feed-forward configs of one kind, first to last."""
    return [block.feed_forward for block in first_blocks(config) if isinstance(block.feed_forward, kind)]


def first_experts(config: TransformerConfig) -> MoEConfig:
    """Those of the first layer that has some. Raises UserError when none has."""
    found = layers_of(config, MoEConfig)
    if not found:
        raise UserError("no layer of this model has experts")
    return found[0]


def qwen_keys(config: TransformerConfig) -> dict[str, Any]:
    """What both write alike; the layers without experts are listed."""
    blocks = first_blocks(config)
    moe = first_experts(config)
    dense = next(iter(layers_of(config, FeedForwardConfig)), moe)
    return common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": dense.size, "moe_intermediate_size": moe.size,
        "num_experts": moe.experts, "num_experts_per_tok": moe.experts_per_token, "norm_topk_prob": moe.normalize,
        "router_aux_loss_coef": moe.auxiliary_loss, "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, b in enumerate(blocks) if not isinstance(b.feed_forward, MoEConfig)],
    }  # fmt: skip


def qwen2_moe_keys(config: TransformerConfig) -> dict[str, Any]:
    blocks = first_blocks(config)
    own = {
        "shared_expert_intermediate_size": first_experts(config).shared_size,
        "qkv_bias": blocks[0].attention.qkv_bias,
    }
    return qwen_keys(config) | window_keys([block.attention.window for block in blocks]) | own


def qwen3_moe_keys(config: TransformerConfig) -> dict[str, Any]:
    attention = first_blocks(config)[0].attention
    return qwen_keys(config) | {
        "attention_bias": attention.qkv_bias, "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
    }  # fmt: skip


MIXTRAL = Family(
    name="Mixtral", model_types=("mixtral",), architecture="MixtralForCausalLM", config=mixtral, keys=mixtral_keys,
    table=lambda _: MIXTRAL_TABLE, absent=NO_BALANCE, harmless=frozenset({"router_jitter_noise"}), unused=(INV_FREQ,),
)  # fmt: skip
QWEN2_MOE = Family(
    name="Qwen2-MoE", model_types=("qwen2_moe",), architecture="Qwen2MoeForCausalLM", config=qwen2_moe,
    keys=qwen2_moe_keys, table=lambda _: QWEN2_TABLE, absent=NO_BALANCE, unused=(INV_FREQ,),
)  # fmt: skip
QWEN3_MOE = Family(
    name="Qwen3-MoE", model_types=("qwen3_moe",), architecture="Qwen3MoeForCausalLM", config=qwen3_moe,
    keys=qwen3_moe_keys, table=lambda _: QWEN3_TABLE, absent=NO_BALANCE, unused=(INV_FREQ,),
)  # fmt: skip
