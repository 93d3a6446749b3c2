"""GPT-OSS (arXiv:2508.10925): attention sinks, a window in every other layer, experts with offsets and a cut gate."""

import dataclasses
from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.experts import NO_BALANCE, auxiliary, norm_of
from maxstack.models.families.family import Family, first_blocks, read_rope, stacks_of
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.weights import Form, Place, Special, Table, whole
from maxstack.models.moe import MoEConfig
from maxstack.models.transformer import TransformerConfig

DEFAULT_SCALING = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""The rotary scaling of a config.json that says none."""


def every_other(start: int):
    """What lies in every second column of a tensor: gate and up take turns."""

    def form(place: Place) -> Form:
        *rest, columns = place.shape
        return Form((*rest, 2 * columns), lambda a: a[..., start::2])

    return form


EXPERTS = LAYER + "mlp.experts."
GPT_OSS_TABLE: Table = {
    **TABLE,
    "attention.sinks": LAYER + "self_attn.sinks",
    "feed_forward.router": LAYER + "mlp.router.weight",
    "feed_forward.router_b": LAYER + "mlp.router.bias",
    "feed_forward.gate": Special(EXPERTS + "gate_up_proj", every_other(0)),
    "feed_forward.up": Special(EXPERTS + "gate_up_proj", every_other(1)),
    "feed_forward.gate_b": Special(EXPERTS + "gate_up_proj_bias", every_other(0)),
    "feed_forward.up_b": Special(EXPERTS + "gate_up_proj_bias", every_other(1)),
    "feed_forward.down": Special(EXPERTS + "down_proj", whole),
    "feed_forward.down_b": Special(EXPERTS + "down_proj_bias", whole),
}


def config(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    keys.expect("swiglu_alpha", 1.702)
    per_token = keys.whole("num_experts_per_tok", 4)
    keys.expect("experts_per_token", per_token)  # a copy in the published ones
    if "rope_parameters" not in keys:
        keys = keys.with_defaults({"rope_scaling": DEFAULT_SCALING})
    bias = keys.flag("attention_bias", True)
    full = AttentionConfig(
        **sizes(keys, head_size=64), rope=read_rope(keys, theta=150_000.0), qkv_bias=bias, output_bias=bias, sinks=True
    )  # fmt: skip
    experts = MoEConfig(
        size=keys.whole("intermediate_size"), experts=keys.whole("num_local_experts"), experts_per_token=per_token,
        bias=True, router_bias=True, activation="quick_gelu", clamp=float(keys.number("swiglu_limit", 7.0)),
        up_offset=1.0, auxiliary_loss=auxiliary(keys),
    )  # fmt: skip
    kinds = {
        kind: BlockConfig(
            attention=dataclasses.replace(full, window=window), feed_forward=experts, norm=norm_of(keys, 1e-5)
        )
        for kind, window in (
            ("full_attention", None),
            ("sliding_attention", keys.whole("sliding_window", 128)),
        )
    }
    usual = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(keys.whole("num_hidden_layers"))
    ]
    blocks = [kinds[kind] for kind in keys.choices("layer_types", usual, *kinds)]
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def keys(config: TransformerConfig) -> dict[str, Any]:
    blocks = first_blocks(config)
    attention, moe = blocks[0].attention, blocks[0].feed_forward
    windows = [block.attention.window for block in blocks]
    return {"rope_scaling": {"rope_type": "default"}} | common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": moe.size, "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token, "swiglu_limit": moe.clamp,
        "router_aux_loss_coef": moe.auxiliary_loss, "attention_bias": attention.qkv_bias,
        "sliding_window": next(filter(None, windows), 128),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }  # fmt: skip


GPT_OSS = Family(
    name="GPT-OSS", model_types=("gpt_oss",), architecture="GptOssForCausalLM", config=config, keys=keys,
    table=lambda _: GPT_OSS_TABLE, absent=NO_BALANCE, harmless=frozenset({"initial_context_length"}),
    unused=(INV_FREQ,),
)  # fmt: skip
