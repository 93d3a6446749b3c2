"""The mesh, the rules from logical to mesh axes, and what is refused before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxstack import sharding
from maxstack.config import UserError
from maxstack.sharding import MeshConfig, build_mesh, check_divides, local_rows, weight_shardings, weight_spec

DEVICES = jax.devices()[:8]


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return build_mesh(MeshConfig(**sizes), DEVICES)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, (1, 8, 1, 1, 1, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1, 1, 1, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 2, 4, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1, 1, 1)),
    ],
)
def test_one_size_is_what_is_left(sizes, wanted):
    assert MeshConfig(**sizes).sizes(8) == wanted
    mesh = mesh_of(**sizes)
    assert tuple(mesh.shape.values()) == wanted
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3}, r"fsdp 3 x .* takes 3 devices, but there are 8: change the --mesh"),
        ({"data": 3}, r"takes 3 devices or a multiple, but there are 8"),
        ({"data": 4, "fsdp": 4}, "takes 16 devices, but there are 8"),
        ({"data": -1}, "at most one of them -1"),
        ({"fsdp": 0}, "fsdp 0 .*sizes are positive"),
        ({"tensor": -2}, "tensor -2 .*sizes are positive"),
        ({"expert": 2}, "mesh.expert is 2: sharding over expert is not built yet, use 1"),
        ({"context": 2, "fsdp": 4}, "mesh.context is 2"),
        ({"stage": 8, "fsdp": 1}, "mesh.stage is 8"),
    ],
)
def test_sizes_that_do_not_multiply_out_are_refused_with_the_numbers(sizes, words):
    with pytest.raises(UserError, match=words):
        MeshConfig(**sizes).sizes(8)


AXES = ("layers", "embed", "heads", "head_dim")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_says_which_kinds_of_array_are_cut_over_fsdp(zero):
    kinds = ("parameters", "gradients", "optimizer", "compute")
    cut = [kind for kind in kinds if "fsdp" in weight_spec(AXES, kind, zero)]
    assert (
        cut == [[], ["optimizer"], ["gradients", "optimizer"], ["parameters", "gradients", "optimizer"]][zero]
    )


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        (AXES, (None, "fsdp", "tensor", None)),
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("layers", "mlp", "embed"), (None, "tensor", "fsdp")),
        (("layers", "expert", "embed", "mlp"), (None, None, "fsdp", "tensor")),
        (("layers", "norm"), (None, None)),
        (("heads",), ("tensor",)),
    ],
)
def test_logical_axes_lead_to_mesh_axes(axes, wanted):
    assert weight_spec(axes, "parameters", 3) == PartitionSpec(*wanted)
    assert weight_spec(axes, "compute", 3) == PartitionSpec(
        *(None if axis == "fsdp" else axis for axis in wanted)
    )


def test_an_unknown_logical_axis_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"no logical axis 'taps': the known ones are layers, .*'whole'"):
        weight_spec(("taps", "mlp"), "parameters", 3)
    assert weight_spec(("whole", "mlp"), "parameters", 3) == PartitionSpec(None, "tensor")


def test_each_device_holds_its_share():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    axes = {"q": AXES}
    for zero, share in ((3, 4), (2, 2)):  # cut over fsdp and tensor, or tensor alone
        spec = weight_shardings(mesh, axes, "parameters", zero)["q"]
        array = jax.device_put(jnp.zeros((2, 16, 4, 8)), spec)
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // share}


def test_axes_of_size_one_are_left_out():
    spec = weight_shardings(mesh_of(fsdp=8), {"q": AXES}, "parameters", 3)["q"].spec
    assert spec == PartitionSpec(None, "fsdp", None, None)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 30, 4, 8), r"stacks.q \(2, 30, 4, 8\): 30 does not divide by mesh fsdp = 4; .*--mesh.fsdp"),
        ((2, 32, 3, 8), r"\(2, 32, 3, 8\): 3 does not divide by mesh tensor = 2; .*--mesh.tensor"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(shape, words):
    held = weight_shardings(mesh_of(fsdp=4, tensor=2), {"stacks.q": AXES}, "parameters", 3)
    check_divides({"stacks.q": (2, 32, 4, 8)}, held)
    with pytest.raises(UserError, match=words):
        check_divides({"stacks.q": shape}, held)


def test_this_process_feeds_all_rows_of_its_devices():
    assert local_rows(mesh_of(data=2, fsdp=4), 16) == slice(0, 16)
    assert local_rows(mesh_of(fsdp=4, tensor=2), 4) == slice(0, 4)
    with pytest.raises(UserError, match="batch of 12 rows does not divide over data x fsdp = 8 devices"):
        local_rows(mesh_of(data=2, fsdp=4), 12)


class TwoProcesses:
    """Stands for a sharding of 8 devices, of which this process has some."""

    def __init__(self, *held: slice):
        self.held = held

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return {i: (part,) for i, part in enumerate(self.held)}


@pytest.mark.parametrize(
    ("held", "wanted"),
    [((slice(8, 12), slice(12, 16)), slice(8, 16)), ((slice(0, 4), slice(0, 4)), slice(0, 4))],
)
def test_a_second_process_feeds_its_own_rows(monkeypatch, held, wanted):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: TwoProcesses(*held))
    assert local_rows(mesh_of(data=4, fsdp=1, tensor=2), 16) == wanted


def test_rows_that_are_not_contiguous_are_refused(monkeypatch):
    held = (slice(0, 4), slice(8, 12))
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: TwoProcesses(*held))
    with pytest.raises(UserError, match="not contiguous: order mesh devices by process"):
        local_rows(mesh_of(data=4, fsdp=1, tensor=2), 16)


def test_batches_are_cut_by_rows_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    where = sharding.batch_sharding(mesh, leading=1)
    rows = np.arange(3 * 8 * 5, dtype=np.int32).reshape(3, 8, 5)
    array = sharding.global_arrays(where, rows, rows.shape)
    assert np.array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2, 5)}


def test_without_a_mesh_every_function_is_the_identity():
    x = jnp.ones((2, 3, 4))
    assert sharding.current_mesh() is None
    assert sharding.on_one_device()
    assert sharding.activation_spec("batch", "sequence", "embed") is None
    assert sharding.constrain(x, "batch", "sequence", "embed") is x
    assert sharding.gather(x, ("embed", "heads", "head_dim"), jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gathering_casts_first_and_frees_the_cut_over_fsdp():
    mesh = mesh_of(fsdp=4, tensor=2)
    held = weight_shardings(mesh, {"w": ("embed", "mlp")}, "parameters", 3)["w"]
    with jax.set_mesh(mesh):
        run = jax.jit(lambda w: sharding.gather(w, ("embed", "mlp"), jnp.dtype(jnp.bfloat16)))
        w = jax.device_put(jnp.ones((16, 8)), held)
        assert run(w).sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "tensor")), 2)
        program = str(jax.make_jaxpr(run)(w))
        assert program.index("convert_element_type") < program.index("reshard")


def test_an_explicit_mesh_refuses_a_contraction_over_a_cut_dimension():
    # Why products name the sharding of their result: a layout is decided while tracing, never guessed.
    mesh = mesh_of(fsdp=8)
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    w = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, PartitionSpec("fsdp", None)))
    with jax.set_mesh(mesh), pytest.raises(Exception, match="out_sharding"):
        jax.jit(lambda x, w: x @ w)(x, w)


def test_the_default_mesh_shards_everything():
    assert dataclasses.asdict(MeshConfig())["zero"] == 3
