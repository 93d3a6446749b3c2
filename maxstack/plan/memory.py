"""Bytes on one device by kind, from shapes, the sharding rules and the remat policy; nothing is compiled.

Arrays that the state holds are exact. Activations are an estimate of what the layers keep for the backward pass and
of the largest thing that is there for a moment; the compiler's own figure is what decides.
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh

from maxstack import sharding
from maxstack.models.account import layers
from maxstack.models.block import BlockConfig
from maxstack.models.transformer import TransformerConfig
from maxstack.optim.layout import matrix_dims
from maxstack.train.memory import device_bytes, gradients_of
from maxstack.train.run import RunConfig
from maxstack.train.state import Layout, layout

FLOAT32 = 4
"""Bytes of a float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that holds most."""

    parameters: int
    """Float32 weights and buffers."""
    optimizer: int
    """Optimizer state."""
    ema: int
    """Averaged weights."""
    gradients: int
    """Float32 gradients of a step; with several micro-batches they stay while the next are computed."""
    activations: int
    """Estimate: what all layers keep of a micro-batch for the backward pass."""
    working: int
    """Estimate: the larger of one layer's backward pass with its gathered weights and the loss with its own."""
    batch: int
    """Tokens, labels, segments, positions, weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def run_memory(run: RunConfig, devices: int) -> Memory:
    """Memory of a training run on `devices` devices. Raises UserError when its mesh or its sizes do not divide."""
    mesh = AbstractMesh(run.mesh.sizes(devices), sharding.MESH_AXES)
    # Only sizes are asked of the mesh: the plan needs no devices.
    plan = layout(run.model, run.optim, mesh, zero=run.mesh.zero, steps=run.steps)
    state = state_memory(plan, run.model)
    tokens = run.batch_rows // run.micro_batches * run.data.seq_len
    local = -(-tokens // math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES))
    kept, working = activation_bytes(run.model, plan, local, mesh.shape["tensor"])
    return dataclasses.replace(
        state, activations=kept, working=working, batch=batch_bytes(local * run.micro_batches)
    )


def state_memory(plan: Layout, config: TransformerConfig) -> Memory:
    """What the state holds, and its gradients, on one device."""
    state = plan.abstract(config)
    return Memory(
        parameters=device_bytes([state.params, state.buffers]),
        optimizer=device_bytes(state.opt_state),
        ema=device_bytes(state.ema),
        gradients=device_bytes(gradients_of(plan)),
        activations=0,
        working=0,
        batch=0,
    )


def batch_bytes(tokens: int) -> int:
    """Four arrays of int32 and one of float32."""
    return 5 * FLOAT32 * tokens


def activation_bytes(config: TransformerConfig, plan: Layout, tokens: int, tensor: int) -> tuple[int, int]:
    """Estimates for `tokens` tokens a device: what all layers keep, and the largest thing that comes and goes."""
    size = 2 if config.dtype == "bfloat16" else FLOAT32
    kept = working = 0
    for index, (repeats, block) in enumerate(layers(config)):
        weights = block_weights(config, plan, index)
        widths = Widths.of(block, config.width, weights, plan.axes, tensor)
        kept += (
            repeats * tokens * (widths.kept(config.remat) * size + widths.statistics(config.remat) * FLOAT32)
        )
        gathered = sum(math.prod(shape) for shape in weights.values()) // tensor
        # Each weight once as operand and once as gradient; each activation once, and once as its gradient.
        working = max(working, 2 * gathered * size + 2 * tokens * widths.kept("none") * size)
    head = config.width * config.vocab_size // tensor
    return kept, max(working, head * (size + FLOAT32) + 2 * tokens * config.width * size)


@dataclasses.dataclass(frozen=True)
class Widths:
    """Numbers a layer makes of each token, on one device."""

    stream: int
    """The residual stream."""
    products: int
    """Results of weight products."""
    attended: int
    """Output of attention, all heads."""
    others: int
    """Norms, rotated queries and keys, the gated product: the rest of what the products are computed from."""
    heads: int
    """Query heads, each with one log-sum-exp."""

    @classmethod
    def of(
        cls, block: BlockConfig, width: int, weights: Mapping[str, tuple[int, ...]],
        axes: Mapping[str, tuple[str, ...]], tensor: int,
    ) -> "Widths":  # fmt: skip
        """Of one layer whose weights (one repeat) are given."""
        outputs = inputs = attended = 0
        for name, shape in weights.items():
            own = axes[name][1:]
            dims = matrix_dims(own)
            if dims is None:
                continue
            _, fan_in, fan_out = dims.sizes(shape)
            used = getattr(block.feed_forward, "experts_per_token", 1) if "expert" in own else 1
            split = tensor if {"heads", "kv_heads", "mlp"} & set(own) else 1
            if own[-1] == "embed":
                outputs += used * fan_out
                inputs += used * fan_in // split
                attended += fan_in // split if ".attention." in name else 0
            else:
                outputs += used * fan_out // split
        heads = getattr(block.attention, "heads", 1) // tensor
        return cls(width, outputs, attended, 3 * width + 2 * inputs, heads)

    def kept(self, remat: str) -> int:
        """Numbers in the compute type kept for the backward pass."""
        return {
            "none": self.stream + self.products + self.others,
            "dots": self.stream + self.products + self.attended,
            "attention": self.stream + self.attended,
            "full": self.stream,
            "offload": 0,
        }[remat]

    def statistics(self, remat: str) -> int:
        """Float32 numbers kept for the backward pass."""
        return self.heads if remat in ("none", "dots", "attention") else 0


def block_weights(config: TransformerConfig, plan: Layout, index: int) -> dict[str, tuple[int, ...]]:
    """Shapes, without the axis of repeats, of the weights of the index-th kind of layer."""
    places = [(i, j) for i, stack in enumerate(config.stacks) for j in range(len(stack.pattern))]
    prefix = "stacks.{}.layers.{}.".format(*places[index])
    return {name: tuple(shape.shape[1:]) for name, shape in plan.shapes.items() if name.startswith(prefix)}
