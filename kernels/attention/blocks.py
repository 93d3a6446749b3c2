"""How attention is cut: sizes of blocks, pairs a step, and which keys a block of queries can see at all."""

from dataclasses import asdict, dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from maxstack.kernels import tiles
from maxstack.kernels.attention.masks import Coordinates, Options


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of the blocks of `xla`; they change its speed and memory, not its result."""

    query: int = 256
    """Queries a block (positions). 128 and 512 were slower at 512 positions on XLA:CPU."""
    key: int = 512
    """Keys a block where key blocks are looped over (positions)."""
    unrolled: int = 8
    """At most this many query blocks are unrolled; more are looped over."""
    step_bytes: int = 2**22
    """Float32 logits one step may hold, unless one pair alone takes more (bytes). Default: stays in the caches
    of a CPU; an accelerator has use for much more."""


AXES = {
    "query": (128, 256, 512),
    "key": (256, 512, 1024),
    "unrolled": (4, 8, 16),
    "step_bytes": (2**20, 2**21, 2**22, 2**23, 2**24),
}
MOST_STEP_BYTES = 2**30


def blocks_for(which: str, q_btnh: Array, k_bskh: Array, v_bskw: Array) -> Blocks:
    """What the tables have for the "forward" or "backward" pass of a call, else the defaults."""
    (t, h), (s, w) = q_btnh.shape[1::2], v_bskw.shape[1::2]
    shape = {"t": tiles.about(t), "s": tiles.about(s), "h": h, "w": w}
    name, rule = f"attention.xla.{which}", asdict(Blocks())
    return Blocks(**tiles.chosen(name, q_btnh.dtype, shape, rule, axes=AXES, fault=_fault))


def _fault(sizes: tiles.Sizes) -> str | None:
    if min(sizes["query"], sizes["key"]) < 8:
        return f"blocks are of 8 positions at least, not {sizes['query']} queries and {sizes['key']} keys"
    if sizes["step_bytes"] > MOST_STEP_BYTES:
        return f"a step of {sizes['step_bytes']} bytes; {MOST_STEP_BYTES} is the most"
    return None


def pairs_a_step(pairs: int, pair_bytes: int, blocks: Blocks) -> int:
    """The largest divisor of `pairs` whose logits fit `step_bytes`, at least 1."""
    most = max(blocks.step_bytes // pair_bytes, 1)
    return max(d for d in range(1, min(most, pairs) + 1) if pairs % d == 0)


def static_range(t0: int, t1: int, s: int, at: Coordinates, options: Options) -> tuple[int, int]:
    """Keys [lo, hi) that queries [t0, t1) can see by their indices; all, where positions are only known at run time."""
    if at.q_positions is not None or at.kv_positions is not None:
        return 0, s
    hi = min(t1, s) if options.causal else s
    lo = 0 if options.window is None else max(t0 - options.window + 1, 0)
    return min(lo, hi), hi


def visible_blocks(
    at: Coordinates, options: Options, t: int, s: int, blocks: Blocks
) -> Bool[Array, "q_blocks s_blocks"]:
    """False where no query of a block sees any key of another, judged by the extremes of positions and segments."""
    q_least, q_most = _extremes(at.q_positions, t, blocks.query)
    kv_least, kv_most = _extremes(at.kv_positions, s, blocks.key)
    see = jnp.ones((1, q_least.shape[1], kv_least.shape[1]), bool)
    if options.causal:
        see &= kv_least[:, None, :] <= q_most[:, :, None]
    if options.window is not None:
        see &= q_least[:, :, None] - kv_most[:, None, :] < options.window
    if at.q_segments is not None:
        q_least, q_most = _extremes(at.q_segments, t, blocks.query)
        kv_least, kv_most = _extremes(at.kv_segments, s, blocks.key)
        see &= (kv_least[:, None, :] <= q_most[:, :, None]) & (kv_most[:, None, :] >= q_least[:, :, None])
        see &= (kv_most > 0)[:, None, :]
    return see.any(0)


def _extremes(coordinate: Int[Array, "b x"] | None, size: int, block: int):
    """Least and most of each block, [b or 1, blocks]; None is the index."""
    padded = -(-size // block) * block
    if coordinate is None:
        coordinate = jnp.arange(size)[None]
    coordinate = jnp.pad(coordinate, ((0, 0), (0, padded - size)), mode="edge")
    grouped = coordinate.reshape(coordinate.shape[0], -1, block)
    return grouped.min(-1), grouped.max(-1)
