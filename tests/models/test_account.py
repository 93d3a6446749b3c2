"""The accounting of parameters, FLOPs and bytes: against published numbers, by hand, and against the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.kernels.attention import native
from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    MLAConfig,
    MoEConfig,
    StackConfig,
    TransformerConfig,
    llama,
    tree,
)
from maxstack.models.account import account_of, cache_bytes, cache_bytes_read, visible_keys

LLAMA_3_8B = llama(
    vocab_size=128_256, width=4096, depth=32, heads=32, kv_heads=8, feed_forward=14_336, tie_embeddings=False
)


def model(*pattern: BlockConfig, repeats: int = 3, **settings) -> TransformerConfig:
    """A model with width 64 and 100 tokens."""
    stacks = (StackConfig(pattern=pattern, repeats=repeats),)
    return TransformerConfig(vocab_size=100, width=64, stacks=stacks, **settings)


ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_size=16)
FEED_FORWARD = FeedForwardConfig(size=128)
# q and o 64x64, k and v 64x32; gate, up, down 64x128.
ATTENTION_SIZE = 2 * 64 * 64 + 2 * 64 * 32
FEED_FORWARD_SIZE = 3 * 64 * 128


def test_llama_3_8b_costs_what_is_published():
    found = account_of(LLAMA_3_8B, 8192)
    assert found.parameters == 8_030_261_248  # the model card's 8.03B, of the released tensors
    # 57.9 and 51.5 GFLOP a token, rounded to three digits.
    assert found.training_flops_full / 1e9 == pytest.approx(57.9, abs=0.05)
    assert found.training_flops_causal / 1e9 == pytest.approx(51.5, abs=0.05)
    # 32 layers x 2 x 8 heads x 128, two bytes each.
    assert cache_bytes(LLAMA_3_8B, "bfloat16") == 131_072


def test_parts_add_up_to_the_arrays_of_the_model():
    config = model(BlockConfig(attention=ATTENTION, feed_forward=FEED_FORWARD), tie_embeddings=False)
    found = account_of(config, 32)
    arrays = tree.leaves(config.build(jax.random.key(0)))
    assert sum(found.by_part.values()) == found.parameters == sum(leaf.size for leaf in arrays.values())
    assert found.by_part == {
        "embedding": 6400, "head": 6400, "norms": 7 * 64,
        "attention": 3 * ATTENTION_SIZE, "feed_forward": 3 * FEED_FORWARD_SIZE,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_only_looked_up_costs_a_row(tied):
    config = model(BlockConfig(attention=ATTENTION, feed_forward=FEED_FORWARD), tie_embeddings=tied)
    found = account_of(config, 32)
    matrices = 3 * (ATTENTION_SIZE + FEED_FORWARD_SIZE) + 6400
    assert found.matrix_parameters == matrices
    row_and_norms = (0 if tied else 64) + 7 * 64
    assert found.weight_bytes("bfloat16") == 2 * (matrices + row_and_norms)


def test_biases_cost_no_product():
    block = BlockConfig(
        attention=AttentionConfig(
            heads=4, kv_heads=2, head_size=16, qkv_bias=True, output_bias=True, sinks=True
        ),
        feed_forward=FeedForwardConfig(size=128, bias=True),
    )
    plain = BlockConfig(attention=ATTENTION, feed_forward=FEED_FORWARD)
    assert account_of(model(block), 32).matrix_parameters == account_of(model(plain), 32).matrix_parameters


def test_a_mixture_of_experts_counts_those_a_token_uses():
    experts = MoEConfig(size=32, experts=8, experts_per_token=2, shared_size=48)
    found = account_of(model(BlockConfig(attention=ATTENTION, feed_forward=experts), repeats=2), 16)
    one, shared, router = 3 * 64 * 32, 3 * 64 * 48, 64 * 8
    layer = ATTENTION_SIZE + 2 * one + shared + router
    assert found.by_part["experts"] == 2 * 8 * one
    assert found.by_part["router"] == 2 * router
    assert found.by_part["feed_forward"] == 2 * shared
    assert found.matrix_parameters == 2 * layer + 6400
    assert found.active_parameters == found.parameters - 2 * 6 * one
    # Scores and values: 2 x 2 FLOPs for each of 4 heads of 16, 16 keys or half of them.
    assert found.training_flops_full == 6 * (2 * layer + 6400) + 3 * 2 * 4 * 64 * 16
    assert found.training_flops_causal == 6 * (2 * layer + 6400) + 3 * 2 * 4 * 64 * 8


def test_latent_attention_by_hand():
    latent = MLAConfig(heads=4, kv_rank=24, q_rank=40, nope_size=16, rope_size=8, v_size=12)
    config = model(BlockConfig(attention=latent, feed_forward=FEED_FORWARD), repeats=1)
    found = account_of(config, 16)
    maps = 64 * 40 + 40 * 4 * 24 + 64 * 24 + 64 * 8 + 24 * 4 * 16 + 24 * 4 * 12 + 4 * 12 * 64
    assert found.matrix_parameters == maps + FEED_FORWARD_SIZE + 6400
    # A score is 24 multiply-adds, a value 12, each of 4 heads.
    assert found.attention_flops_full == 2 * 4 * (24 + 12) * 16
    # The cache holds the latent and the shared rotated key, whatever the number of heads.
    assert cache_bytes(config, "bfloat16") == 2 * (24 + 8)


def test_a_sliding_window_counts_its_keys():
    windowed = BlockConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=16, window=24), feed_forward=FEED_FORWARD
    )
    whole = BlockConfig(attention=ATTENTION, feed_forward=FEED_FORWARD)
    config = model(windowed, windowed, whole, repeats=2)
    found = account_of(config, 128)
    assert found.attention_flops_full == 4 * 64 * (4 * 24 + 2 * 128)
    assert found.attention_flops_causal == 4 * 64 * (4 * visible_keys(128, 24) + 2 * 64)
    each = 2 * 2 * 16
    assert cache_bytes(config, "bfloat16") == 2 * 6 * each
    assert cache_bytes_read(config, 128, "bfloat16") == 2 * each * (4 * 24 + 2 * 128)


@pytest.mark.parametrize(("seq_len", "window"), [(128, None), (128, 24), (128, 128), (128, 1000), (96, 95)])
def test_visible_keys_are_those_of_the_mask(seq_len, window):
    distance = np.arange(seq_len)[:, None] - np.arange(seq_len)
    counted = ((distance >= 0) & (distance < (window or seq_len))).sum() / seq_len
    # The convention leaves out half a key: the diagonal of the triangle counts half.
    assert visible_keys(seq_len, window) == pytest.approx(counted, abs=0.5)


def step_flops(config: TransformerConfig, rows: int, seq_len: int) -> float:
    """FLOPs of loss and gradients, as XLA counts them."""

    def loss(arrays, tokens):
        logits = tree.rebuild(abstract, arrays)(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(tree.leaves(abstract), tokens).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("seq_len", [32, 256])
def test_xla_counts_the_flops_of_a_training_step(seq_len, monkeypatch):
    """XLA counts every key (no skipped blocks here), as the "full" convention does, and besides it element by element:
    norms, rotations, softmax, activations and their derivatives, which are of the order of a hundred FLOPs for each
    number of width and ten for each attention weight. At width 512 that is a few per cent of the matrix products;
    less than the products is never right.
    """
    monkeypatch.setattr(native, "declined", lambda *_: "XLA does not count what C++ computes")
    block = BlockConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=128),
        feed_forward=FeedForwardConfig(size=1024),
    )
    # One repeat: XLA counts the body of a loop once, however often it runs.
    stacks = (StackConfig(pattern=(block, block), repeats=1),)
    config = TransformerConfig(vocab_size=512, width=512, stacks=stacks, dtype="float32")
    counted = step_flops(config, 2, seq_len) / (2 * seq_len)
    assert 1.0 <= counted / account_of(config, seq_len).training_flops_full < 1.06
