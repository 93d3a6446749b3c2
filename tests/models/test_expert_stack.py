"""Experts that stay in the stack of all layers give what those give that a scan cuts out of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.kernels.dispatch import Chip
from maxstack.models import MoEConfig
from maxstack.models.expert_stack import OfStack, settled
from maxstack.models.generation import panel_stack
from maxstack.models.moe import Experts, run_experts
from maxstack.models.packed import PackedMatrix
from maxstack.models.packing import experts, packed
from maxstack.models.paged.forward import Chunk, advance
from maxstack.models.paged.pools import init_pools
from maxstack.models.tree import part
from maxstack.sharding import MeshConfig
from tests.models.tiny import CONFIGS, QUICK, build

TPU, GPU = Chip("tpu", "v6e"), Chip("gpu", "sm90")
LAYERS, E, D, F = 3, 4, 32, 16
CONFIG = MoEConfig(size=F, experts=E, experts_per_token=2)
CHUNK = Chunk(
    np.asarray([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32), np.asarray([[0, 2], [1, 3]], np.int32),
    np.zeros(2, np.int32), np.asarray([4, 3], np.int32), np.full(2, 4, np.int32),
)  # fmt: skip


def stream(model) -> np.ndarray:
    """The residual stream of a chunk over pages."""
    pools = init_pools(model.config, 4, 4, "float32")
    return np.asarray(jax.jit(lambda *a: advance(*a)[0], compiler_options=QUICK)(model, pools, CHUNK))


KINDS = ["int4-g32", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("float32", "int8"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_over_pages_is_the_same_with_experts_in_their_stack(kind, monkeypatch):
    model = build(CONFIGS["mixture"])
    model = model if kind == "float32" else packed(model, kind)
    wanted = stream(model)
    monkeypatch.setattr(panel_stack, "chip", lambda: TPU)
    seen = []
    times = OfStack.times
    monkeypatch.setattr(OfStack, "times", lambda w, *a: (seen.append(w.stack.shape), times(w, *a))[1])
    np.testing.assert_array_equal(stream(model), wanted)
    assert len(seen) == 3
    assert {shape[:2] for shape in seen} == {(2, 4)}


def test_only_what_a_chip_s_kernel_finds_stays_whole(monkeypatch):
    model = build(CONFIGS["mixture"])
    few = packed(model, "int4-g32")
    for name, _ in experts(model):
        for chip, in_full, in_few_bits in (
            (TPU, True, True),
            (GPU, False, True),
            (Chip("cpu", "cpu"), False, False),
        ):
            monkeypatch.setattr(panel_stack, "chip", lambda chip=chip: chip)
            assert panel_stack.stays_whole(part(model, name)) == in_full
            assert isinstance(part(few, name), PackedMatrix)
            assert panel_stack.stays_whole(part(few, name)) == in_few_bits


def drawn(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def routed() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, the experts of each, and their weights."""
    chosen = jnp.asarray([[[0, 3], [1, 3]], [[3, 2], [0, 1]]])
    return drawn(2, 2, D, seed=0), chosen, jax.nn.softmax(drawn(2, 2, 2, seed=1))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=1, tensor=2), pytest.param(MeshConfig(fsdp=2), marks=pytest.mark.slow)]
)
def test_experts_in_their_stack_over_devices_are_those_of_one(mesh):
    inner, up, last = (drawn(LAYERS, E, *s, seed=i) for i, s in enumerate(((D, F), (D, F), (F, D))))
    operands = routed()
    wanted = run_experts(*operands, Experts(inner[2], up[2], last[2]), CONFIG)
    devices = sharding.build_mesh(mesh, jax.devices()[:2])
    with jax.set_mesh(devices):
        place = lambda array, *spec: jax.device_put(array, jax.NamedSharding(devices, jax.P(*spec)))  # noqa: E731
        if mesh.tensor == 2:
            tokens, first, second = (), (None, None, None, "tensor"), (None, None, "tensor")
        else:
            tokens, first, second = ("fsdp",), (None, None, "fsdp"), (None, None, None, "fsdp")
        x, *others = (place(array, *tokens) for array in operands)
        stacks = place(inner, *first), place(up, *first), place(last, *second)

        def run(layer, x, chosen, weights, *stacks):
            in_stack = [OfStack(stack, layer) for stack in stacks]
            assert all(isinstance(settled(w, x), OfStack) == (mesh.tensor == 2) for w in in_stack)
            return run_experts(x, chosen, weights, Experts(*in_stack), CONFIG)

        found = jax.jit(run)(jnp.int32(2), x, *others, *stacks)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5)


def test_experts_of_another_type_than_the_tokens_are_cut_out_and_cast():
    stack = OfStack(drawn(LAYERS, E, D, F, seed=0), jnp.int32(1))
    x = drawn(1, 2, D, seed=1)
    assert settled(stack, x) is stack
    np.testing.assert_array_equal(settled(stack, x.astype(jnp.bfloat16)), stack.stack[1])
