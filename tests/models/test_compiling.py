"""What programs that read all weights for a few tokens are told, by the chip; docs/kernels.md has what came of it."""

import jax
import jax.numpy as jnp
import pytest

from maxstack import sharding
from maxstack.kernels.dispatch import CPU, Chip, compiling_for
from maxstack.models import AttentionConfig, BlockConfig, MoEConfig, StackConfig, TransformerConfig, tree
from maxstack.models.compiling import format_for, lies, reading_weights
from maxstack.models.generation.weights import for_accelerator, laid_out, moved

V7X = Chip("tpu", "v7x")


@pytest.fixture
def alone():
    """The sharding of an array on one device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize(("chip", "told"), [(Chip("gpu", "sm90"), True), (V7X, False), (CPU, False)])
def test_gpus_multiply_where_the_weights_lie(chip, told):
    with compiling_for(chip):
        assert bool(reading_weights()) is told


def test_matrices_of_at_least_a_tile_get_the_chip_s_own(alone):
    def of(*shape, dtype=jnp.bfloat16, where=alone):
        return format_for(jax.ShapeDtypeStruct(shape, dtype), where)

    with compiling_for(V7X):
        found = of(3, 64, 32)
        assert (found.layout.tiling, found.layout.major_to_minor) == (((16, 128), (2, 1)), (0, 1, 2))
        assert found.sharding == alone
        assert of(3, 64, 8, 128) is None  # 8 kv heads: the compiler would die
        assert of(3, 64, 32, dtype=jnp.float32) is None
        assert of(64, 32) is None  # one matrix: it is not copied
        assert of(3, 64, 32, where=None) is None
    for other in (Chip("tpu", "v6e"), Chip("gpu", "sm90"), CPU):
        with compiling_for(other):
            assert of(3, 64, 32) is None


def test_rows_are_counted_on_one_device_of_a_mesh():
    mesh = sharding.build_mesh(sharding.MeshConfig(fsdp=1, tensor=4), jax.devices()[:4])
    where = jax.NamedSharding(mesh, jax.P(None, "tensor", None))
    with compiling_for(V7X):
        assert format_for(jax.ShapeDtypeStruct((3, 64, 32), jnp.bfloat16), where) is not None
        assert format_for(jax.ShapeDtypeStruct((3, 32, 32), jnp.bfloat16), where) is None


def test_only_products_of_the_layers_are_laid_out(alone):
    """Experts go to a kernel, which takes arrays as they come."""
    block = BlockConfig(
        attention=AttentionConfig(heads=16, kv_heads=2, head_size=16),
        feed_forward=MoEConfig(size=32, experts=4, experts_per_token=2),
    )
    config = TransformerConfig(
        vocab_size=64, width=32, stacks=(StackConfig(pattern=(block,), repeats=2),), dtype="bfloat16"
    )
    shapes = jax.eval_shape(lambda: for_accelerator(config.build(jax.random.key(0))))
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone)
        for name, leaf in tree.leaves(shapes).items()
    }
    with compiling_for(V7X):
        found = tree.leaves(laid_out(tree.rebuild(shapes, placed)))
    tiled = {name for name, leaf in found.items() if isinstance(leaf.format, jax.experimental.layout.Format)}
    tiled = {name for name in tiled if found[name].format.layout is not None}
    assert {name.split(".")[-2] for name in tiled} == {"q", "o"}


def test_a_device_that_does_not_take_the_tiles_serves_with_its_own(alone, monkeypatch, caplog):
    w = jnp.ones((2, 16, 128), jnp.bfloat16)

    def refuses(*given, **options):
        raise ValueError("no such tiles")

    with compiling_for(V7X):
        wanted = format_for(w, w.sharding)
        monkeypatch.setattr(jax, "device_put", refuses)
        assert moved(w, wanted, use_up=True) is w
    assert "no such tiles" in caplog.text
    assert not w.is_deleted()


def test_a_format_is_part_of_a_place_only_where_it_may_differ():
    w = jnp.ones((2, 16, 128), jnp.bfloat16)
    assert lies(w) == w.sharding
    with compiling_for(V7X):
        assert lies(w) == w.format
