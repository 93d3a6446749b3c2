"""The rows of kernels.py: each kernel at each shape, its contenders, its FLOPs and bytes, and its goal on Hopper."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from turns import Contender  # beside this file

HEADS, KV_HEADS, SIZE = 32, 8, 128
LENGTHS = (2048, 4096, 8192, 16_384)
PACKED, DOCUMENTS = 8192, 8
SEQUENCES, CACHED, PAGE = 64, 8192, 128
INPUTS, OUTPUTS = 8192, 28_672

Turn = Callable[[], float]
"""One timed turn of a contender: seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """What a Hopper card shall show; None is no demand."""

    peer: float | None = None
    """Times the speed of the best peer."""
    bandwidth: float | None = None
    """Share of the memory bandwidth."""

    def __str__(self) -> str:
        parts = []
        if self.peer is not None:
            parts.append(f"≥ {self.peer:g} × the best peer")
        if self.bandwidth is not None:
            parts.append(f"≥ {self.bandwidth:.0%} of bandwidth")
        return ", ".join(parts) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel at one shape."""

    kernel: str
    shape: str
    goal: Goal
    contenders: dict[str, Callable[[], Turn]]
    """By name, ours first; each is made when it is its row's turn. Unsupported says why one cannot take part."""
    flops: float = 0.0
    bytes: float = 0.0


class Torch:
    """PyTorch in its own process, started when it is first needed."""

    def __init__(self, python: str):
        self.python = python
        self.process: Contender | None = None

    def attention(self, **spec: Any) -> Turn:
        from maxstack.kernels import Unsupported

        if not self.python:
            raise Unsupported("no --torch-python")
        if self.process is None:
            script = Path(__file__).with_name("torch_attention.py")
            self.process = Contender("PyTorch", [self.python, str(script)])
        line, process = json.dumps(spec), self.process
        if (reason := process.ask(line).get("declined")) is not None:
            raise Unsupported(reason)
        return lambda: process.ask(line)["seconds"]


def rows(torch: Torch, seconds: float) -> Iterator[Row]:
    """All rows, made one after another."""
    yield from attention_rows(torch, seconds)
    yield from paged_rows(seconds)
    yield from matmul_rows(seconds)


def turn(make: Callable[[], Callable], seconds: float, results: list | None = None) -> Turn:
    """A compiled call, timed over as many repeats as fill `seconds`. `results` takes those of the first contender, with
    which those of the others have to agree: Unsupported where they do not."""
    import jax

    from maxstack.bench.measure import times
    from maxstack.bench.tune.results import apart
    from maxstack.kernels import Unsupported

    call = make()
    if results is not None and not results:
        results.append(jax.block_until_ready(call()))
    elif results is not None and (difference := apart(call(), results[0])) is not None:
        raise Unsupported(f"other results than ours: {difference}")
    return lambda: times({"": call}, rounds=1, least_seconds=seconds)[""][0]


# Attention.


def attention_rows(torch: Torch, seconds: float) -> Iterator[Row]:
    import jax.numpy as jnp
    import numpy as np

    from maxstack.bench.kernels import cudnn_attention, jax_attention
    from maxstack.kernels.attention import attention

    jax_side = {
        "XLA": jax_attention, "cuDNN": cudnn_attention, "tokamax": tokamax_attention, "jax flash": jax_flash,
        "jax splash": jax_splash,
    }  # fmt: skip
    heads = f"{HEADS}/{KV_HEADS} heads of {SIZE}"
    for backward, goal in ((False, Goal(peer=1.0)), (True, Goal(peer=0.95))):
        for length in LENGTHS:
            call = partial(attention_call, length=length, backward=backward)
            results: list[Any] = []
            contenders = {
                name: partial(turn, partial(call, function), seconds, results)
                for name, function in {"ours": attention, **jax_side}.items()
            }
            contenders["PyTorch"] = partial(
                torch.attention, **spec(length), backward=backward, seconds=seconds
            )
            yield Row(
                kernel=f"attention {'backward' if backward else 'forward'}", shape=f"{length:,} tokens, {heads}",
                goal=goal, contenders=contenders,
                flops=(5 if backward else 2) * HEADS * SIZE * length * (length + 1),
            )  # fmt: skip
    segments = jnp.asarray(np.repeat(np.arange(DOCUMENTS) + 1, PACKED // DOCUMENTS)[None], jnp.int32)
    call = partial(attention_call, length=PACKED, backward=False)
    each = PACKED // DOCUMENTS
    yield Row(
        kernel=f"attention forward, {DOCUMENTS} documents packed; peers ignore that", goal=Goal(peer=1.5),
        shape=f"{PACKED:,} tokens, {heads}", flops=2 * HEADS * SIZE * DOCUMENTS * each * (each + 1),
        contenders={
            "ours": partial(turn, partial(call, partial(attention, segment_ids=segments)), seconds),
            **{name: partial(turn, partial(call, of), seconds) for name, of in jax_side.items()},
            "PyTorch": partial(torch.attention, **spec(PACKED), backward=False, seconds=seconds),
        },
    )  # fmt: skip


def spec(length: int) -> dict[str, int]:
    return {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "size": SIZE}


def attention_call(function: Callable, *, length: int, backward: bool) -> Callable:
    """One row, causal; the backward pass alone, of what the forward pass has kept."""
    import jax

    from maxstack.bench.kernels import values
    from maxstack.bench.measure import prepared

    q, k, v = (values(i, 1, length, n, SIZE) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    if not backward:
        return prepared(function, q, k, v)
    out, pull = jax.jit(lambda *each: jax.vjp(function, *each))(q, k, v)
    return prepared(lambda pull, gradient: pull(gradient), pull, values(3, *out.shape))


def tokamax_attention(q: Any, k: Any, v: Any) -> Any:
    return optional("tokamax").dot_product_attention(q, k, v, is_causal=True)


def jax_flash(q: Any, k: Any, v: Any) -> Any:
    """jax.experimental.pallas.ops.tpu.flash_attention, which takes heads first and as many of keys as of queries."""
    import jax.numpy as jnp

    only("tpu", "it is for TPUs")
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5), 1, 2)


def jax_splash(q: Any, k: Any, v: Any) -> Any:
    """jax.experimental.pallas.ops.tpu.splash_attention, one kv head at a time."""
    import jax
    import jax.numpy as jnp

    only("tpu", "it is for TPUs")
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, group = q.shape[1], q.shape[2] // k.shape[2]
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((length, length)) for _ in range(group)]
    )
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask)
    q = jnp.moveaxis(q.reshape(1, length, -1, group, q.shape[-1]), 1, 3) * q.shape[-1] ** -0.5
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    out: Any = jax.vmap(jax.vmap(kernel))(q, k, v)
    return jnp.moveaxis(out, 3, 1).reshape(1, length, -1, out.shape[-1])


# Attention over pages.


def paged_rows(seconds: float) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxstack.bench.kernels import values
    from maxstack.bench.measure import prepared
    from maxstack.kernels.paged_attention import bytes_moved, init_cache, paged_attention

    pages = SEQUENCES * CACHED // PAGE
    table = jnp.asarray(np.random.default_rng(0).permutation(pages).reshape(SEQUENCES, -1), jnp.int32)
    lengths = jnp.full(SEQUENCES, CACHED, jnp.int32)

    def ours(dtype: Any) -> Callable:
        cache = init_cache(pages, KV_HEADS, SIZE, page=PAGE, dtype=dtype)
        return prepared(paged_attention, values(0, SEQUENCES, HEADS, SIZE), cache, table, lengths)

    def jax_own() -> Callable:
        only("tpu", "it is for TPUs")
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as peer

        keys, other = (values(i, KV_HEADS, pages, PAGE, SIZE) for i in (1, 2))
        q = values(0, SEQUENCES, HEADS, SIZE)
        call = partial(peer, pages_per_compute_block=8)
        return prepared(call, q, keys, other, lengths, table)

    dtypes: tuple[Any, ...] = ("bfloat16", "int8", "int4")
    for dtype in dtypes:
        cache = jax.eval_shape(partial(init_cache, pages, KV_HEADS, SIZE, page=PAGE, dtype=dtype))
        contenders = {"ours": partial(turn, partial(ours, dtype), seconds)}
        if dtype == "bfloat16":
            contenders["jax paged"] = partial(turn, jax_own, seconds)
        yield Row(
            kernel=f"paged decode, {dtype}", contenders=contenders,
            shape=f"{SEQUENCES} × {CACHED:,} tokens, {HEADS}/{KV_HEADS} heads of {SIZE}",
            goal=Goal(bandwidth=0.8 if dtype == "bfloat16" else 0.7),
            bytes=bytes_moved(cache, np.full(SEQUENCES, CACHED), (SEQUENCES, HEADS, SIZE)),
        )  # fmt: skip


# Products with weights of few bits.


def matmul_rows(seconds: float) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from maxstack.bench.kernels import values
    from maxstack.bench.measure import prepared
    from maxstack.kernels.quantized_matmul import quantize, quantized_matmul

    def ours(kind: Any, tokens: int) -> Callable:
        w = jax.jit(partial(quantize, kind=kind))(values(0, OUTPUTS, INPUTS))
        return prepared(quantized_matmul, values(1, tokens, INPUTS), w)

    def plain(tokens: int) -> Callable:
        return prepared(lambda x, w: x @ w, values(1, tokens, INPUTS), values(0, INPUTS, OUTPUTS))

    kinds: tuple[Any, ...] = ("int4-g128", "int8")
    for kind in kinds:
        for tokens in (1, 16, 64, 512):
            w = jax.eval_shape(
                partial(quantize, kind=kind), jax.ShapeDtypeStruct((OUTPUTS, INPUTS), jnp.bfloat16)
            )
            moved = INPUTS * OUTPUTS * w.bits / 8 + w.scale.size * w.scale.dtype.itemsize
            goal = Goal(peer=2.4, bandwidth=0.6) if kind == "int4-g128" and tokens == 1 else Goal()
            yield Row(
                kernel=f"matmul, {kind}", shape=f"{tokens:,} tokens, {INPUTS:,} to {OUTPUTS:,}", goal=goal,
                flops=2.0 * tokens * INPUTS * OUTPUTS, bytes=moved + 2 * tokens * (INPUTS + OUTPUTS),
                contenders={
                    "ours": partial(turn, partial(ours, kind, tokens), seconds),
                    "bfloat16": partial(turn, partial(plain, tokens), seconds),
                },
            )  # fmt: skip


def optional(package: str) -> Any:
    """A package that is no dependency; Unsupported says that it is not installed."""
    from maxstack.kernels import Unsupported

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise Unsupported(f"{package} is not installed") from error


def only(platform: str, reason: str) -> None:
    """Unsupported where the platform is another."""
    from maxstack.kernels import Unsupported
    from maxstack.kernels.dispatch import chip

    if chip().platform != platform:
        raise Unsupported(reason)
