"""The kernels at shapes of real models, beside what one would use instead."""

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.bench.measure import Case, Prepared, prepared
from maxstack.kernels import Unsupported
from maxstack.kernels.attention import attention
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.kernels.dispatch import chip
from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.kernels.paged_attention import bytes_moved, init_cache, paged_attention
from maxstack.kernels.quantized_matmul import KINDS, quantize, quantized_matmul

MOST_LOGITS_BYTES = 2 * 2**30
"""A peer that holds all logits at once is left out where they take more."""


def small() -> bool:
    """Whether this machine gets shapes that a CPU finishes in seconds."""
    return chip().platform == "cpu"


def values(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    """Normal numbers, made on the device; the same array again while somebody holds it."""
    made = (seed, shape, jnp.dtype(dtype or (jnp.float32 if small() else jnp.bfloat16)))
    array = _held.get(made)
    if array is None:
        _held[made] = array = _normal(*made)
    return array


_held: MutableMapping[Any, jax.Array] = WeakValueDictionary()


@partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def attention_cases() -> Iterator[Case]:
    """Causal attention of one row, forward and backward, without packing and with."""
    heads, kv_heads, size = (8, 2, 64) if small() else (32, 8, 128)
    for length in (2048, 8192) if small() else (2048, 4096, 8192, 16384):
        pairs = length * (length + 1) / 2
        for backward in (False, True):
            products = 7 if backward else 2  # QK and PV; and five more products for the gradients
            yield Case(
                kernel=f"attention {'forward and backward' if backward else 'forward'}",
                shape=f"{length:,} tokens, {heads}/{kv_heads} heads of {size}",
                flops=2 * products * heads * size * pairs,
                contenders={
                    "ours": partial(attention_call, attention, length, heads, kv_heads, size, backward),
                    "jax.nn": partial(attention_call, jax_attention, length, heads, kv_heads, size, backward),
                    "cuDNN": partial(
                        attention_call, cudnn_attention, length, heads, kv_heads, size, backward
                    ),
                },
            )
    packed = 2048 if small() else 8192
    segments = jnp.asarray(np.repeat(np.arange(8) + 1, packed // 8)[None], jnp.int32)
    yield Case(
        kernel="attention forward, 8 documents packed", shape=f"{packed:,} tokens, {heads}/{kv_heads} heads of {size}",
        flops=4 * heads * size * 8 * (packed / 8) * (packed / 8 + 1) / 2,
        contenders={
            "ours": partial(
                attention_call, partial(attention, segment_ids=segments), packed, heads, kv_heads, size, False
            ),
            "ours, not packed": partial(attention_call, attention, packed, heads, kv_heads, size, False),
        },
    )  # fmt: skip


def attention_call(
    function: Callable, length: int, heads: int, kv_heads: int, size: int, backward: bool
) -> Prepared:
    """Causal attention of one row of `length` tokens, with the gradients of a weighted sum of the output or without."""
    q, k, v = (values(i, 1, length, n, size) for i, n in enumerate((heads, kv_heads, kv_heads)))
    if not backward:
        return prepared(function, q, k, v)
    weights = values(3, 1, length, heads, size)

    def loss(q, k, v):
        return jnp.sum((function(q, k, v) * weights).astype(jnp.float32))

    return prepared(jax.grad(loss, (0, 1, 2)), q, k, v)


def jax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax's own, as XLA compiles it."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """NVIDIA's, where there is one of its GPUs."""
    if chip().platform != "gpu":
        raise Unsupported("cuDNN is NVIDIA's")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def cross_entropy_cases() -> Iterator[Case]:
    """A loss over a vocabulary of 152k with its gradients; also with a fifth of the tokens supervised."""
    tokens, width, vocabulary = (512, 576, 152_064) if small() else (8192, 4096, 152_064)
    for supervised in (1.0, 0.2):
        flops = 6 * tokens * supervised * width * vocabulary
        contenders: dict[str, Callable[[], Prepared]] = {
            "ours": partial(cross_entropy_call, ours_loss, tokens, width, vocabulary, supervised)
        }
        if 4 * tokens * vocabulary <= MOST_LOGITS_BYTES:
            contenders["whole logits"] = partial(
                cross_entropy_call, plain_loss, tokens, width, vocabulary, supervised
            )
        yield Case(
            kernel="cross-entropy with gradients", flops=flops, contenders=contenders,
            shape=f"{tokens:,} tokens ({supervised:.0%} supervised), {width:,} to {vocabulary:,}",
        )  # fmt: skip


def cross_entropy_call(
    function: Callable, tokens: int, width: int, vocabulary: int, supervised: float
) -> Prepared:
    """The loss and its gradients by hidden states and output projection."""
    x, w = values(0, tokens, width), values(1, width, vocabulary)
    random = np.random.default_rng(0)
    labels = jnp.asarray(random.integers(0, vocabulary, tokens), jnp.int32)
    weights = jnp.asarray(random.random(tokens) < supervised, jnp.float32)
    return prepared(jax.value_and_grad(function, (0, 1)), x, w, labels, weights)


def ours_loss(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Never all logits."""
    return cross_entropy(x, w, labels, weights)[0]


def plain_loss(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """All logits at once."""
    log_p = jax.nn.log_softmax(jnp.einsum("td,dv->tv", x, w, preferred_element_type=jnp.float32))
    return -jnp.sum(jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0] * weights)


def paged_attention_cases() -> Iterator[Case]:
    """One token of many sequences against their pages, by the type of the pages."""
    heads, kv_heads, size = (9, 3, 64) if small() else (32, 8, 128)
    sequences, length, page = (8, 1024, 128) if small() else (64, 8192, 128)
    pages = sequences * length // page
    table = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(sequences, -1)
    lengths = np.full(sequences, length, np.int32)

    def call(dtype: Any) -> Prepared:
        cache = init_cache(pages, kv_heads, size, page=page, dtype=dtype)
        q = values(0, sequences, heads, size)
        return prepared(paged_attention, q, cache, jnp.asarray(table), jnp.asarray(lengths))

    wide: Any = "float32" if small() else "bfloat16"
    for dtype in (wide, "int8", "int4"):
        cache = jax.eval_shape(partial(init_cache, pages, kv_heads, size, page=page, dtype=dtype))
        moved = bytes_moved(cache, lengths, (sequences, heads, size), q_bytes=4 if small() else 2)
        contenders = {"ours": partial(call, dtype)}
        if dtype != wide:
            contenders[f"ours, {wide}"] = partial(call, wide)
        yield Case(
            kernel=f"paged decode attention, {dtype}", bytes=moved, contenders=contenders,
            shape=f"{sequences} × {length:,} tokens, {heads}/{kv_heads} heads of {size}",
        )  # fmt: skip


def quantized_matmul_cases() -> Iterator[Case]:
    """Products of few and many tokens with packed weights, beside the same with the weight as it was."""
    inputs, outputs = (2048, 8192) if small() else (8192, 28_672)
    wide_bytes = 4 if small() else 2

    def ours(kind: Any, tokens: int) -> Prepared:
        w = jax.jit(partial(quantize, kind=kind))(values(0, outputs, inputs))
        return prepared(quantized_matmul, values(1, tokens, inputs), w)

    def plain(tokens: int) -> Prepared:
        return prepared(lambda x, w: x @ w, values(1, tokens, inputs), values(0, inputs, outputs))

    kinds: tuple[Any, ...] = tuple(KINDS)
    for tokens in (1, 8, 128) if small() else (1, 16, 256, 4096):
        for kind in kinds:
            w = jax.eval_shape(
                partial(quantize, kind=kind), jax.ShapeDtypeStruct((outputs, inputs), jnp.float32)
            )
            bits = 8 if kind == "int8" else 4
            scales = w.scale.size * w.scale.dtype.itemsize
            yield Case(
                kernel=f"quantized matmul, {kind}", shape=f"{tokens:,} tokens, {inputs:,} to {outputs:,}",
                flops=2.0 * tokens * inputs * outputs,
                bytes=inputs * outputs * bits / 8 + scales + tokens * (inputs + outputs) * wide_bytes,
                contenders={"ours": partial(ours, kind, tokens), "not quantized": partial(plain, tokens)},
            )  # fmt: skip


def grouped_matmul_cases() -> Iterator[Case]:
    """The first product of a mixture of experts, tokens sorted by expert: of a training step, with its gradients, and
    of a decoding step with packed weights, beside the same with weights as they were."""
    rows, width, inner, experts = (4096, 512, 1024, 8) if small() else (65_536, 4096, 1536, 64)
    sizes = spread(rows, experts)

    def forward(function: Callable) -> Prepared:
        return prepared(function, values(0, rows, width), values(1, experts, width, inner), sizes)

    def backward(function: Callable) -> Prepared:
        weights = values(2, rows, inner)

        def loss(x, w, sizes):
            return jnp.sum((function(x, w, sizes) * weights).astype(jnp.float32))

        return prepared(
            jax.grad(loss, (0, 1)), values(0, rows, width), values(1, experts, width, inner), sizes
        )

    for name, call, products in (("", forward, 1), (" forward and backward", backward, 3)):
        yield Case(
            kernel=f"grouped matmul{name}", shape=f"{rows:,} rows in {experts} groups, {width:,} to {inner:,}",
            flops=2.0 * products * rows * width * inner,
            contenders={"ours": partial(call, grouped_matmul), "ragged_dot": partial(call, jax.lax.ragged_dot)},
        )  # fmt: skip
    yield from packed_experts_cases()


def spread(rows: int, experts: int) -> jax.Array:
    """How many rows each of some experts gets, all alike likely."""
    random = np.random.default_rng(0)
    return jnp.asarray(random.multinomial(rows, np.full(experts, 1 / experts)), jnp.int32)


def packed_experts_cases() -> Iterator[Case]:
    """Tokens of a decoding step, each with eight experts."""
    tokens, width, inner, experts = (1, 1024, 512, 64) if small() else (32, 2048, 768, 128)
    rows, wide_bytes = 8 * tokens, 4 if small() else 2
    sizes = spread(rows, experts)
    used = int((sizes > 0).sum())
    storage: Any = "bytes" if small() else "int4"

    def ours(kind: Any) -> Prepared:
        pack = jax.jit(jax.vmap(partial(quantize, kind=kind, storage=storage)))
        return prepared(grouped_matmul, values(0, rows, width), pack(values(1, experts, inner, width)), sizes)

    def plain() -> Prepared:
        return prepared(grouped_matmul, values(0, rows, width), values(1, experts, width, inner), sizes)

    kinds: tuple[Any, ...] = tuple(KINDS)
    for kind in kinds:
        w = jax.eval_shape(partial(quantize, kind=kind), jax.ShapeDtypeStruct((inner, width), jnp.float32))
        bits = 8 if kind == "int8" else 4
        weight_bytes = width * inner * bits / 8 + w.scale.size * w.scale.dtype.itemsize
        yield Case(
            kernel=f"grouped matmul, {kind}",
            shape=f"{rows} rows in {used} of {experts} groups, {width:,} to {inner:,}",
            flops=2.0 * rows * width * inner,
            bytes=used * weight_bytes + rows * (width + inner) * wide_bytes,
            contenders={"ours": partial(ours, kind), "not quantized": plain},
        )  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "paged_attention": paged_attention_cases,
    "quantized_matmul": quantized_matmul_cases,
    "grouped_matmul": grouped_matmul_cases,
    "cross_entropy": cross_entropy_cases,
}
"""By the name of the kernel's folder."""
