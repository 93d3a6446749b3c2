"""Muon as the TPU compiler lays it out: whole matrices come to each chip by all-to-all, never the whole stack."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from maxstack.optim import OptimConfig, build, state_axes

AXES = {"up": ("layers", "embed", "mlp"), "out": ("layers", "heads", "head_dim", "embed")}
SHAPES = {"up": (32, 512, 2048), "out": (32, 4, 128, 512)}


@pytest.mark.usefixtures("optimized")
@pytest.mark.tpu_aot
def test_on_a_tpu_the_matrices_move_by_all_to_all():
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    kinds = (AxisType.Explicit,) * 2
    mesh = Mesh(np.array(devices).reshape(8, 2), ("fsdp", "tensor"), axis_types=kinds)
    rules = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}

    def placed(shape: tuple[int, ...], axes: tuple[str, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, jax.P(*[rules.get(axis) for axis in axes]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    optimizer = build(OptimConfig(name="muon"), 100, AXES)
    params = {name: placed(SHAPES[name], axes) for name, axes in AXES.items()}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(optimizer.init, params)
        state = jax.tree.map(
            lambda leaf, axes: placed(leaf.shape, axes, leaf.dtype), state, state_axes(state, params, AXES)
        )
        program = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params).compile()
    moves = re.findall(
        r" (all-to-all|all-gather|all-reduce|collective-permute)(?:-start)?\(", str(program.as_text())
    )
    assert set(moves) == {"all-to-all"}
    assert len(moves) == 8, "for each of two leaves, two mesh axes there and back"
    stacks = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < stacks / 4, "a chip never holds a whole stack; its share is a sixteenth"
