"""The server's steps as a compiler makes them for chips that are not here: shapes in, machine code out."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from maxstack.config import UserError
from maxstack.models.transformer import TransformerConfig

PAGE = 128
Weights = Literal["bfloat16", "int8", "int4-g32", "int4-g128"]
PageNumbers = Literal["bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step is compiled for."""

    config: TransformerConfig
    topology: str
    """As libtpu names it, such as "v6e:1x1"; its chips share each layer (tensor-parallel)."""
    rows: int
    width: int = 16
    """Pages of each row that its table has room for."""
    pages: int = 0
    """Of the pool; by default what all rows can use."""
    weights: Weights = "bfloat16"
    kv: PageNumbers = "bfloat16"
    chips: int = 0
    """Of the topology, that take part; by default all."""
    chunk: int = 0
    """Tokens of each row's prompt that the step reads; 0 for a decode step."""


class Made(NamedTuple):
    """A compiled step, and the shapes that it takes."""

    compiled: Any
    leaves: list[Any]
    """Of the weights, as they lie on the chips."""
    pools: Any
    state: Any
    chips: int


def made(setting: Setting, devices: Sequence[Any] | None = None) -> Made:
    """Compile the step of all rows, for `devices` of a topology description or those that `setting` names. Raises
    UserError where these need libtpu and it is not installed."""
    import jax
    from jax.sharding import Mesh, NamedSharding

    from maxstack import sharding
    from maxstack.kernels.dispatch import chip_of, compiling_for
    from maxstack.models.compiling import reading_weights
    from maxstack.models.generation.params import row_settings
    from maxstack.models.paged.layer import cut
    from maxstack.models.paged.pools import init_pools
    from maxstack.serve import programs
    from maxstack.serve.device import NEUTRAL
    from maxstack.serve.forms import scanned

    config, rows = setting.config, setting.rows
    devices = devices_of(setting.topology)[: setting.chips or None] if devices is None else devices
    mesh = Mesh(devices, ("alone",))  # without explicit axes: what one device holds has no layout
    if len(devices) > 1:
        mesh = sharding.build_mesh(sharding.MeshConfig(fsdp=1, tensor=len(devices)), list(devices))
    whole = NamedSharding(mesh, jax.P())

    def placed(leaf: Any) -> Any:
        spec = leaf.sharding.spec if len(devices) > 1 else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with compiling_for(chip_of(devices[0])), sharding.on_mesh(mesh if len(devices) > 1 else None):
        leaves, treedef = jax.tree.flatten(abstract_weights(config, setting.weights, mesh))
        form = scanned(treedef)
        make = partial(init_pools, config, setting.pages or rows * setting.width, PAGE, setting.kv)
        pools = jax.tree.map(placed, jax.eval_shape(lambda: make() if len(devices) == 1 else cut(make())))
        neutral = row_settings([NEUTRAL], config.vocab_size)
        state = jax.eval_shape(lambda: programs.empty_rows(rows + 1, config.vocab_size, neutral))
        read, keep, asked = asked_of(setting)
        state, asked = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), (state, asked)
        )

        def step(leaves, pools, state, asked):
            said, written = read(form, leaves, pools, state, asked)
            return said, *keep(form, pools, state, asked, said, written)

        traced = jax.jit(step, donate_argnums=(1, 2)).trace(leaves, pools, state, asked)
        platform = "tpu" if devices[0].platform == "tpu" else "cuda"
        compiled = traced.lower(lowering_platforms=(platform,)).compile(reading_weights())
    return Made(compiled, leaves, pools, state, len(devices))


def asked_of(setting: Setting) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """The two halves of a step, and the shapes of what the host gives them."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct

    from maxstack.models.generation.params import row_settings
    from maxstack.models.paged.forward import Chunk
    from maxstack.serve import programs
    from maxstack.serve.device import NEUTRAL

    rows, table = setting.rows, (setting.rows, setting.width)

    def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return ShapeDtypeStruct(sizes, dtype)

    if not setting.chunk:
        steps = programs.Steps(shape(rows), shape(*table), shape(rows), shape())
        return programs.decode_read, programs.decode_keep, steps
    tokens, yes = shape(rows, setting.chunk), shape(rows, dtype=jnp.bool)
    chunk = Chunk(tokens, shape(*table), shape(rows), shape(rows), shape(rows))
    settings = row_settings([NEUTRAL] * rows, setting.config.vocab_size)
    prompts = programs.Prompts(shape(rows), chunk, yes, shape(rows), settings, yes, tokens, yes)
    return programs.prompts_read, programs.prompts_keep, prompts


def abstract_weights(config: TransformerConfig, kind: Weights, mesh: Any) -> Any:
    """A model of shapes, as the server takes it: products in the compute type or packed, cut over the mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from maxstack import sharding
    from maxstack.models import tree
    from maxstack.models.generation.weights import cast_products, laid_out
    from maxstack.models.packing import Packing

    with sharding.on_mesh(None):
        model = jax.eval_shape(lambda: config.build(jax.random.key(0)))
        if kind != "bfloat16":
            model = Packing(model, kind, mesh if mesh.size > 1 else None).abstract
        model = jax.eval_shape(lambda model: cast_products(model, jnp.dtype(config.dtype)), model)
    homes = dict.fromkeys(tree.leaves(model), NamedSharding(mesh, jax.P()))
    if mesh.size > 1:
        homes = sharding.weight_shardings(mesh, tree.axes(model), "parameters", 0)
    arrays = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=homes[name])
        for name, leaf in tree.leaves(model).items()
    }
    return laid_out(tree.rebuild(model, arrays))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology that need not exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for {topology} needs its compiler: pip install 'maxstack[aot]'")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # One chip alone is a host of its own; libtpu takes hosts of four unless told.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.partition(":")[2] == "1x1" else {}
    return list(topologies.get_topology_desc(topology, "tpu", **alone).devices)
