"""What llama.cpp calls the tensors (its src/llama-arch.cpp), and how those lie that are no plain matrices."""

from maxstack.models.families.family import first_blocks
from maxstack.models.families.weights import Form, Place, Special, Table, interleaved, matrix, rows
from maxstack.models.transformer import TransformerConfig

BLOCK = "blk.{layer}."
TIED: Table = {
    "embedding.table": "token_embd.weight",
    "final_norm.scale": "output_norm.weight",
    "attention_norm.scale": BLOCK + "attn_norm.weight",
    "feed_forward_norm.scale": BLOCK + "ffn_norm.weight",
    **{f"attention.{p}.w": f"{BLOCK}attn_{p}.weight" for p in "qkv"},
    "attention.o.w": BLOCK + "attn_output.weight",
}
"""What nearly all have; some tie the output projection to the token table whatever a file holds."""
BASE: Table = {**TIED, "head": "output.weight"}
BIASES: Table = {f"attention.{p}.b": f"{BLOCK}attn_{p}.bias" for p in "qkv"}
OUTPUT_BIAS: Table = {"attention.o.b": BLOCK + "attn_output.bias"}
GATED: Table = {f"feed_forward.{p}.w": f"{BLOCK}ffn_{p}.weight" for p in ("gate", "up", "down")}
GATED_BIASES: Table = {f"feed_forward.{p}.b": f"{BLOCK}ffn_{p}.bias" for p in ("gate", "up", "down")}
QK_NORMS: Table = {f"attention.{p}_norm.scale": f"{BLOCK}attn_{p}_norm.weight" for p in "qk"}
POST_NORMS: Table = {
    "attention_post_norm.scale": BLOCK + "post_attention_norm.weight",
    "feed_forward_post_norm.scale": BLOCK + "post_ffw_norm.weight",
}
# llama.cpp rotates neighbouring pairs in some architectures, and stores query and key rows accordingly.
NEIGHBOURS: Table = {
    f"attention.{p}.{kind}": Special(f"{BLOCK}attn_{p}.{name}", interleaved)
    for p in "qk"
    for kind, name in (("w", "weight"), ("b", "bias"))
}


def stacked(place: Place) -> Form:
    """All experts of a layer in one tensor, [experts, outputs, inputs]."""
    e, i, o = place.shape
    return Form((e, o, i), lambda a: a.transpose(0, 2, 1))


EXPERTS: Table = {
    "feed_forward.router": BLOCK + "ffn_gate_inp.weight",
    **{f"feed_forward.{p}": Special(f"{BLOCK}ffn_{p}_exps.weight", stacked) for p in ("gate", "up", "down")},
}
SHARED: Table = {f"feed_forward.shared.{p}.w": f"{BLOCK}ffn_{p}_shexp.weight" for p in ("gate", "up", "down")}


def fused_qkv(config: TransformerConfig) -> Table:
    """Query, key and value in one tensor, one below the other."""
    a = first_blocks(config)[0].attention
    n, k = a.heads * a.head_size, a.kv_heads * a.head_size
    parts = (("q", 0, n), ("k", n, k), ("v", n + k, k))
    return {
        f"attention.{p}.w": Special(BLOCK + "attn_qkv.weight", rows(start, size, n + 2 * k, matrix))
        for p, start, size in parts
    }


def fused_gate(config: TransformerConfig) -> Table:
    """Gate and up in one tensor, one below the other, which llama.cpp calls up."""
    size = first_blocks(config)[0].feed_forward.size
    parts = {
        f"feed_forward.{part}.w": Special(BLOCK + "ffn_up.weight", rows(i * size, size, 2 * size, matrix))
        for i, part in enumerate(("gate", "up"))
    }
    return {**parts, "feed_forward.down.w": BLOCK + "ffn_down.weight"}
