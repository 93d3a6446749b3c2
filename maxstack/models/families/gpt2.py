"""GPT-2 (Radford et al. 2019): learned positions, layer norms, offsets everywhere, matrices stored in → out."""

from functools import partial
from typing import Any

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Special, Table, as_it_is, columns, untransposed
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import LayerNormConfig
from maxstack.models.transformer import StackConfig, TransformerConfig

LAYER = "transformer.h.{layer}."
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


def config(keys: Keys) -> TransformerConfig:
    keys.expect("scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        keys.expect(name, False)
    width, heads = keys.whole("n_embd"), keys.whole("n_head")
    if width % heads:
        raise UserError(f"{keys.where}: n_embd {width} must be a multiple of n_head {heads}")
    norm = LayerNormConfig(eps=float(keys.number("layer_norm_epsilon", 1e-5)))
    block = BlockConfig(
        attention=AttentionConfig(
            heads=heads, kv_heads=heads, head_size=width // heads, rope=None, qkv_bias=True, output_bias=True
        ),
        feed_forward=FeedForwardConfig(
            size=keys.whole("n_inner", 4 * width), gated=False, bias=True,
            activation=ACTIVATIONS[keys.expect("activation_function", *ACTIVATIONS)],  # type: ignore[arg-type]
        ),
        norm=norm,
    )  # fmt: skip
    return TransformerConfig(
        vocab_size=keys.whole("vocab_size"), width=width, final_norm=norm, learned_positions=True,
        stacks=(StackConfig(pattern=(block,), repeats=keys.whole("n_layer")),),
        tie_embeddings=keys.flag("tie_word_embeddings", True), max_length=keys.whole("n_positions", 1024),
    )  # fmt: skip


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "n_embd": config.width, "n_layer": config.depth,
        "n_head": block.attention.heads, "n_inner": block.feed_forward.size, "n_positions": config.max_length,
        "layer_norm_epsilon": block.norm.eps, "tie_word_embeddings": config.tie_embeddings,
        "activation_function": names[block.feed_forward.activation],
    }  # fmt: skip


def table(config: TransformerConfig) -> Table:
    width = config.width
    fused: Table = {
        f"attention.{part}.{leaf}": Special(
            f"{LAYER}attn.c_attn.{name}", columns(i * width, width, 3 * width, form)
        )
        for i, part in enumerate("qkv")
        for leaf, name, form in (("w", "weight", untransposed), ("b", "bias", as_it_is))
    }
    two = partial(untransposed, inputs=2)
    return {
        "embedding.table": "transformer.wte.weight",
        "positions.table": "transformer.wpe.weight",
        "final_norm.scale": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
        **fused,
        "attention.o.w": Special(LAYER + "attn.c_proj.weight", two),
        "attention.o.b": LAYER + "attn.c_proj.bias",
        "feed_forward.up.w": Special(LAYER + "mlp.c_fc.weight", untransposed),
        "feed_forward.up.b": LAYER + "mlp.c_fc.bias",
        "feed_forward.down.w": Special(LAYER + "mlp.c_proj.weight", untransposed),
        "feed_forward.down.b": LAYER + "mlp.c_proj.bias",
        **{
            f"{norm}.{leaf}": f"{LAYER}{theirs}.{name}"
            for norm, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2"))
            for leaf, name in (("scale", "weight"), ("bias", "bias"))
        },
    }


GPT2 = Family(
    name="GPT-2", model_types=("gpt2",), architecture="GPT2LMHeadModel", config=config, keys=keys, table=table,
    # What is there for classification, or changes only the order of operations.
    harmless=frozenset({
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "n_ctx", "reorder_and_upcast_attn",
    }),
    # The published files have no prefix; causal masks are stored with the weights.
    spellings=((r"((h|wte|wpe|ln_f)\..*)", r"transformer.\1"),),
    unused=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)  # fmt: skip
