"""Everything a run carries from step to step, as one immutable tree of named arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from maxstack import checkpoint, sharding
from maxstack.models import Transformer, TransformerConfig, tree
from maxstack.optim import OptimConfig, build, state_axes

Arrays = dict[str, jax.Array]


class Health(NamedTuple):
    """What the skipping of bad steps remembers."""

    norm_mean: jax.Array
    """Running mean of the gradient norm over accepted steps (float32)."""
    accepted: jax.Array
    """Steps whose update was applied (int32)."""
    skipped: jax.Array
    """Steps whose update was not (int32)."""
    skipped_in_a_row: jax.Array
    """The latest of them without an accepted one between (int32)."""


class TrainState(NamedTuple):
    """Step count, float32 weights, buffers, optimizer state, averaged weights (empty if none), random key, health."""

    step: jax.Array
    params: Arrays
    buffers: Arrays
    opt_state: Any
    ema: Arrays
    key: jax.Array
    health: Health


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes and the place of everything, known before anything is computed."""

    model: Transformer
    """The model with shapes for arrays."""
    axes: dict[str, tuple[str, ...]]
    """Logical axes of the trained weights."""
    buffer_axes: dict[str, tuple[str, ...]]
    """Logical axes of the buffers."""
    optimizer: optax.GradientTransformation
    mesh: Mesh | AbstractMesh
    """An abstract one is enough to work out shapes and sizes."""
    zero: int
    averaged: bool
    """Whether an average of the weights is kept."""

    @property
    def devices(self) -> Mesh:
        """The mesh, with its devices. Raises ValueError for a plan of sizes alone."""
        if isinstance(self.mesh, AbstractMesh):
            raise ValueError("this plan works out sizes on an abstract mesh; a step needs one with devices")
        return self.mesh

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the trained weights."""
        found = tree.leaves(self.model)
        return {name: found[name] for name in self.axes}

    def weights(self, kind: sharding.Kind) -> dict[str, NamedSharding]:
        """Where arrays of the shape of the weights live."""
        return sharding.weight_shardings(self.mesh, self.axes, kind, self.zero)

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def opt_state(self) -> Any:
        """Where the optimizer state lives: a tree like it."""
        abstract = jax.eval_shape(self.optimizer.init, self.shapes)
        axes = state_axes(abstract, self.shapes, self.axes)
        return jax.tree.map(
            lambda _, ax: sharding.weight_shardings(self.mesh, {"": ax}, "optimizer", self.zero)[""],
            abstract,
            axes,
        )

    def shardings(self) -> TrainState:
        """Where each part of the state lives."""
        whole = self.replicated
        buffers = sharding.weight_shardings(self.mesh, self.buffer_axes, "compute", self.zero)
        ema = self.weights("optimizer") if self.averaged else {}
        health = Health._make([whole] * len(Health._fields))
        parameters = self.weights("parameters")
        return TrainState._make([whole, parameters, buffers, self.opt_state(), ema, whole, health])

    def abstract(self, config: TransformerConfig) -> TrainState:
        """The state as shapes with shardings: what a checkpoint is restored into."""
        shapes = jax.eval_shape(lambda: fresh(self, config, 0))
        return jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, self.shardings()
        )


def layout(
    config: TransformerConfig, optim: OptimConfig, mesh: Mesh | AbstractMesh, *, zero: int, steps: int
) -> Layout:
    """Plan a run's state. Raises UserError, with the numbers, for a weight that does not divide over the mesh."""
    model = tree.abstract(lambda: config.build(jax.random.key(0)))
    axes, buffers = tree.axes(model), tree.buffer_names(model)
    trained = {name: ax for name, ax in axes.items() if name not in buffers}
    shapes = {name: leaf.shape for name, leaf in tree.leaves(model).items()}
    for kind in ("parameters", "optimizer"):
        sharding.check_divides(shapes, sharding.weight_shardings(mesh, trained, kind, zero))
    buffer_axes = {name: axes[name] for name in sorted(buffers)}
    optimizer = build(optim, steps, trained)
    return Layout(model, trained, buffer_axes, optimizer, mesh, zero, optim.ema_decay > 0)


def fresh(plan: Layout, config: TransformerConfig, seed: int) -> TrainState:
    """The state before the first step. The same for a seed on every mesh. Call it under `jax.jit`."""
    root = jax.random.key(seed)
    arrays = tree.leaves(config.build(root))
    params = {name: arrays[name] for name in plan.axes}
    ema = {name: jnp.copy(leaf) for name, leaf in params.items()} if plan.averaged else {}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, params=params, buffers={name: arrays[name] for name in plan.buffer_axes},
        opt_state=plan.optimizer.init(params), ema=ema, key=jax.random.key_data(jax.random.fold_in(root, 1)),
        health=Health(jnp.zeros((), jnp.float32), zero, zero, zero),
    )  # fmt: skip


def create(plan: Layout, config: TransformerConfig, seed: int) -> TrainState:
    """The state before the first step, each part computed where it lives."""
    with jax.set_mesh(plan.devices):
        return jax.jit(lambda: fresh(plan, config, seed), out_shardings=plan.shardings())()


def with_average(plan: Layout, state: TrainState) -> TrainState:
    """The state with an average of the weights that begins at the weights as they are."""
    with jax.set_mesh(plan.devices):
        copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=plan.weights("optimizer"))
        return state._replace(ema=copy(state.params))


def as_named(state: TrainState) -> dict[str, Any]:
    """The state as a nested dict with stable names, for a checkpoint."""
    return {
        "step": state.step, "params": state.params, "buffers": state.buffers, "ema": state.ema, "key": state.key,
        "opt_state": checkpoint.named(state.opt_state), "health": state.health._asdict(),
    }  # fmt: skip


def from_named(named: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `as_named`; `like` gives the structure."""
    return TrainState(
        step=named["step"], params=named["params"], buffers=named.get("buffers", {}), ema=named.get("ema", {}),
        key=named["key"], opt_state=checkpoint.like(like.opt_state, named["opt_state"]),
        health=Health(**named["health"]),
    )  # fmt: skip
