"""The bytes that a compiled decode step moves on each chip, against the least that it must."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from maxstack.bench.serve.absent_chip import PAGE, Made, Setting, made
from maxstack.plan import collectives
from maxstack.plan.hlo import Array, bits
from maxstack.plan.traffic import Moved, traffic


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Of one chip and one step, in which every row has filled its pages."""

    rows: int
    length: int
    """Tokens of each row, the new one included."""
    weights: int
    """Read once; of the token table the rows that are looked up."""
    cache: int
    """Keys and values of all tokens read once, those of new tokens written."""
    moved: int
    """By the count of the compiled program's instructions."""
    memory: int
    """What has to fit on the chip, with as many pages as these rows need."""
    collectives: int
    """Executions in the step."""
    sent: int
    """Bytes to other chips."""
    flops: float
    """Of the products, by the model's sizes."""

    @property
    def floor(self) -> int:
        """The least. The logits, which could stay on the chip, are not in it."""
        return self.weights + self.cache

    @property
    def useful(self) -> float:
        """Share of what is moved."""
        return self.floor / self.moved


def step_bytes(setting: Setting) -> tuple[StepBytes, list[Moved]]:
    """Compile a step; what it moves, and the largest parts of that."""
    step = made(setting)
    text = step.compiled.as_text() or ""
    found = traffic(text, partial(of_kernel, setting=setting))
    travelling, memory = collectives(text), step.compiled.memory_analysis()
    return (
        StepBytes(
            rows=setting.rows,
            length=setting.width * PAGE,
            weights=weight_bytes(step, setting),
            cache=cache_bytes(step, setting),
            moved=sum(one.bytes for one in found),
            memory=memory.peak_memory_in_bytes
            + memory.generated_code_size_in_bytes
            - unused_bytes(step, setting),
            collectives=sum(one.times for one in travelling),
            sent=round(sum(one.wire_bytes for one in travelling)),
            flops=flops(setting, step.chips),
        ),
        found,
    )


def of_kernel(
    name: str, operands: list[Array | None], results: tuple[Array, ...], *, setting: Setting
) -> int | None:
    """What a call of one of our kernels moves; None for others."""
    kernel, out = name.partition(".")[0], sum(one.bytes for one in results if one.in_hbm)
    given = [one for one in operands if one is not None]
    if kernel == "paged_attention":
        pages = max(one.shape[0] for one in given if len(one.shape) > 2)
        used = setting.rows * setting.width
        return out + sum(
            one.bytes * used // pages if one.shape[:1] == (pages,) else one.bytes for one in given
        )
    if kernel == "append_token":
        pools = [one for one in given if one.shape[:1] == results[0].shape[:1]]
        rest = sum(one.bytes for one in given if one not in pools)
        return rest + 2 * setting.rows * sum(token_bytes(one, i == 0, pools) for i, one in enumerate(pools))
    if kernel == "quantized_matmul":
        # [layers, outputs, inputs]; each tile of outputs reads x again, unless it stays in place.
        values = operands[2]
        total = sum(one.bytes for one in (operands[0], operands[3]) if one is not None)
        total += 0 if values is None else values.bytes // values.shape[0]
        return total + out + x_bytes(operands[1], results[0].shape[1])
    return None


def token_bytes(pool: Array, first: bool, pools: list[Array]) -> int:
    """Read, and written again, for one token: of keys, which are the first of several pools, a strip of their page."""
    from maxstack.kernels.paged_attention.mosaic_tpu_token import STRIP_BYTES

    page = pool.bytes // pool.shape[0]
    keys = first and len(pools) > 1 and pool.shape[-1] % 128 == 0
    return page * STRIP_BYTES * 8 // bits(pool.dtype) // pool.shape[2] if keys else page


def x_bytes(x: Array | None, outputs: int) -> int:
    """Of a product's activations, where they lie in HBM: once, or once for each tile of outputs."""
    from maxstack.kernels.quantized_matmul.mosaic_tpu import MOST_OUTPUTS, resident

    return 0 if x is None else x.bytes * (1 if resident(*x.shape) else -(-outputs // MOST_OUTPUTS))


def held_bytes(leaf: Any) -> int:
    """Of an array on one chip, as it is without the filling of tiles."""
    import jax.numpy as jnp

    size = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return size // 2 if leaf.dtype == jnp.int4 else size * leaf.dtype.itemsize


def weight_bytes(step: Made, setting: Setting) -> int:
    """Of all weights; of a token table that is no output projection, the rows that are looked up."""
    total, config = sum(map(held_bytes, step.leaves)), setting.config
    if config.tie_embeddings and setting.weights == "bfloat16":
        return total
    table = next(leaf for leaf in step.leaves if leaf.shape == (config.vocab_size, config.width))
    row = held_bytes(table) * step.chips // config.vocab_size
    return total - held_bytes(table) + setting.rows * row // step.chips


def cache_bytes(step: Made, setting: Setting) -> int:
    """Of the pages in use, and of the new tokens."""
    import jax

    pages = setting.pages or setting.rows * setting.width
    a_token = sum(map(held_bytes, jax.tree.leaves(step.pools))) / (pages * PAGE)
    return round(a_token * setting.rows * (setting.width * PAGE + 1))


def unused_bytes(step: Made, setting: Setting) -> int:
    """Of the pages that no row has."""
    import jax

    pages = setting.pages or setting.rows * setting.width
    held = sum(map(held_bytes, jax.tree.leaves(step.pools)))
    return held * (pages - setting.rows * setting.width) // pages


def flops(setting: Setting, chips: int) -> float:
    """Products of a step on one chip."""
    from maxstack.models.account import account_of, layers

    config = setting.config
    pairs = sum(repeats * block.attention.flops_per_key() for repeats, block in layers(config))
    a_token = 2 * account_of(config, 1).matrix_parameters + pairs * setting.width * PAGE
    return setting.rows * a_token / chips


def by_part(found: list[Moved]) -> Counter[str]:
    """Bytes by what they are for."""
    total: Counter[str] = Counter()
    for one in found:
        name = one.name.partition(".")[0]
        kind = name if name in ("paged_attention", "quantized_matmul") else one.op
        if name == "append_token":
            kind = "new keys and values"
        elif "dot_general" in one.source:
            kind = "products"
        total[kind] += one.bytes
    return total
