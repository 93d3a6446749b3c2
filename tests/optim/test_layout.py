"""Which leaves are matrices, and which way round."""

import jax
import pytest

from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    MLAConfig,
    MoEConfig,
    StackConfig,
    TransformerConfig,
    tree,
)
from maxstack.optim import decay_mask, matrix_dims, muon_dims


@pytest.mark.parametrize(
    ("axes", "batch", "inputs", "outputs"),
    [
        (("embed", "mlp"), (), (0,), (1,)),
        (("layers", "mlp", "embed"), (0,), (1,), (2,)),
        (("layers", "embed", "heads", "head_dim"), (0,), (1,), (2, 3)),
        (("layers", "heads", "head_dim", "embed"), (0,), (1, 2), (3,)),
        (("layers", "expert", "embed", "mlp"), (0, 1), (2,), (3,)),
        (("layers", "kv_lora", "heads", "head_dim"), (0,), (1,), (2, 3)),
        (("embed", "head_dim"), (), (0,), (1,)),
        (("vocab", "embed"), (), (0,), (1,)),
    ],
)
def test_matrices_map_inputs_to_outputs(axes, batch, inputs, outputs):
    assert matrix_dims(axes) == (batch, inputs, outputs)


@pytest.mark.parametrize(
    "axes",
    [(), ("norm",), ("layers", "norm"), ("layers", "heads", "head_dim"), ("kv_heads", "head_dim"), ("layers", "heads"),
     ("layers", "embed", "expert"), ("layers", "expert", "mlp"), ("vocab",)],
)  # fmt: skip
def test_norms_biases_sinks_and_routers_are_vectors(axes):
    assert matrix_dims(axes) is None


def test_muon_leaves_out_both_ends_of_the_model():
    assert muon_dims(("vocab", "embed")) is None
    assert muon_dims(("embed", "vocab")) is None
    assert muon_dims(("embed", "mlp")) is not None


def test_the_output_matrix_decays_and_the_embedding_only_if_told():
    axes = {"table": ("vocab", "embed"), "head": ("embed", "vocab"), "norm": ("norm",)}
    assert decay_mask(axes, embeddings=False) == {"table": False, "head": True, "norm": False}
    assert decay_mask(axes, embeddings=True) == {"table": True, "head": True, "norm": False}


def test_in_a_real_model_the_matrices_are_the_weights_of_linear_maps_and_experts():
    latent = BlockConfig(
        attention=MLAConfig(heads=2, kv_rank=8, q_rank=8, nope_size=4, rope_size=4, v_size=4),
        feed_forward=MoEConfig(size=8, experts=4, experts_per_token=2, shared_size=8),
    )
    grouped = BlockConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, qkv_bias=True),
        feed_forward=FeedForwardConfig(size=24),
    )
    stacks = (StackConfig(pattern=(latent,), repeats=2), StackConfig(pattern=(grouped,), repeats=2))
    config = TransformerConfig(vocab_size=32, width=16, stacks=stacks)
    model = tree.abstract(lambda: config.build(jax.random.key(0)))
    axes = {name: ax for name, ax in tree.axes(model).items() if name not in tree.buffer_names(model)}
    matrices = {name for name, ax in axes.items() if muon_dims(ax)}
    linear = {name for name in axes if name.endswith(".w")}
    experts = {
        name for name in axes if name.endswith(("feed_forward.gate", "feed_forward.up", "feed_forward.down"))
    }
    assert matrices == linear | experts
    assert len(experts) == 3


def test_the_router_of_a_real_model_is_exempt():
    config = MoEConfig(size=8, experts=4, experts_per_token=2)
    module = tree.abstract(lambda: config.build(jax.random.key(0), 16, 1.0))
    assert matrix_dims(tree.axes(module)["router"]) is None
