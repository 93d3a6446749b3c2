"""Programs of one kernel each at shapes of real models: a function, its arguments as shapes, and the FLOPs and bytes
that nobody who computes it can do without."""

from collections.abc import Callable
from typing import Any

Row = dict[str, str]
"""Of a table, in words; those of the key first."""

MODELS = {
    "1B": (16, 8, 64, 64), "8B": (32, 8, 128, 128), "70B": (64, 8, 128, 128), "MLA": (16, 16, 192, 128),
    "96": (32, 32, 96, 96), "256": (16, 8, 256, 256),
}  # fmt: skip
"""Query heads, kv heads, head size of queries and keys, of values."""
SERVED = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128), "96": (32, 32, 96), "256": (16, 8, 256)}
"""Query heads, kv heads, head size of the models that decode."""
LATENT, VALUES, LATENT_HEADS = 576, 512, 128
"""Components of a cached latent with its rotated part, those that are values, query heads: DeepSeek-V3."""
SEQUENCES, LENGTH, PAGE, POOL = 64, 8192, 128, 4096
WEIGHTS = ("int8", "int4-g128", "int4-g32")
MATRICES = {"1B": (2048, 8192), "8B": (4096, 14_336), "70B": (8192, 28_672)}
"""Inputs and outputs of the gate of a feed-forward layer."""
MIXTURES = {"Qwen3-30B-A3B": (128, 2048, 768), "Mixtral 8x7B": (8, 4096, 14_336)}
"""Experts, inputs and outputs of their gate."""
VOCABULARY = 152_064
WIDTHS = {"1B": 2048, "8B": 4096, "70B": 8192}
"""Of the model, before the vocabulary's matrix."""
TRAINED = 16_384
"""Tokens of a cross-entropy: no other size of its program, so that logits of all tokens would be seen in its text."""
MASKS: dict[str, dict[str, Any]] = {
    "none": {"causal": False},
    "causal": {},
    "packed": {"packed": True},
    "packed, soft cap, sinks": {"packed": True, "softcap": 30.0, "sunk": True},
}


def attention_of(
    model: str, length: int, *, mask: str = "causal", dtype: str = "bfloat16"
) -> tuple[Callable, list]:
    """Forward and backward of one row of `length` tokens, and its arguments: shapes."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.attention import attention

    n, k, h, w = MODELS[model]
    kind = MASKS[mask]

    def both(q, keys, v, out_gradient, sinks, ids):
        def run(q, keys, v):
            segments = ids if kind.get("packed") else None
            sunk = sinks if kind.get("sunk") else None
            options = {"causal": kind.get("causal", True), "softcap": kind.get("softcap")}
            return attention(q, keys, v, segment_ids=segments, sinks=sunk, **options)

        out, pull = jax.vjp(run, q, keys, v)
        return out, pull(out_gradient)

    heads = [(n, h), (k, h), (k, w), (n, w)]
    arguments = [jax.ShapeDtypeStruct((1, length, *each), jnp.dtype(dtype)) for each in heads]
    arguments += [jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)]
    return both, arguments


def attention_work(model: str, length: int) -> tuple[float, float, float, float]:
    """(FLOPs, bytes) of the forward pass and of the backward pass, causal, bfloat16: what no kernel can do without."""
    n, k, h, w = MODELS[model]
    pairs, read = n * length * (length + 1) / 2, 2 * length * (n * h + k * h + k * w)
    out = 2 * length * n * w
    # Backward: S again, dP, dV, dQ, dK; q, k, v, out and its gradient in, three gradients out.
    return 2 * pairs * (h + w), read + out, 2 * pairs * (3 * h + 2 * w), 2 * read + 2 * out


def paged_of(chip: Any, model: str, pages: str, queries: int) -> tuple[Callable, list, float, float]:
    """A serving step of one layer, its shapes, its FLOPs and the bytes that it has to move."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxstack.kernels.dispatch import compiling_for
    from maxstack.kernels.paged_attention import bytes_moved, init_cache, paged_attention

    n, k, h = SERVED[model]
    rows, entries = SEQUENCES if queries == 1 else 4, LENGTH // PAGE
    with compiling_for(chip):
        dtype: Any = pages
        cache = jax.eval_shape(lambda: init_cache(rows * entries, k, h, page=PAGE, dtype=dtype))
    q = (rows, n, h) if queries == 1 else (rows, queries, n, h)
    arguments = [
        jax.ShapeDtypeStruct(q, jnp.bfloat16), cache, jax.ShapeDtypeStruct((rows, entries), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]  # fmt: skip
    seen = LENGTH - (queries - 1) / 2  # of a query of the last ones, on average
    moved = bytes_moved(cache, np.full(rows, LENGTH), q)
    return lambda *each: paged_attention(*each), arguments, 4.0 * rows * queries * seen * n * h, moved


def latent_of(chip: Any, pages: str, queries: int) -> tuple[Callable, list, float, float]:
    """A serving step of one layer of multi-head latent attention; sequences as in `paged_of`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxstack.kernels.dispatch import compiling_for
    from maxstack.kernels.paged_attention import bytes_moved, init_latent_cache, latent_paged_attention

    rows, entries = SEQUENCES if queries == 1 else 4, LENGTH // PAGE
    with compiling_for(chip):
        dtype: Any = pages
        cache = jax.eval_shape(lambda: init_latent_cache(rows * entries, LATENT, page=PAGE, dtype=dtype))
    q = (rows, LATENT_HEADS, LATENT) if queries == 1 else (rows, queries, LATENT_HEADS, LATENT)
    arguments = [
        jax.ShapeDtypeStruct(q, jnp.bfloat16), cache, jax.ShapeDtypeStruct((rows, entries), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]  # fmt: skip
    flops = 2.0 * rows * queries * (LENGTH - (queries - 1) / 2) * LATENT_HEADS * (LATENT + VALUES)
    moved = bytes_moved(cache, np.full(rows, LENGTH), q, value_size=VALUES)
    return (
        lambda *each: latent_paged_attention(*each, value_size=VALUES, scale=0.07), arguments, flops, moved,
    )  # fmt: skip


def append_of(chip: Any, model: str, pages: str, tokens: int) -> tuple[Callable, list, float]:
    """New tokens written behind cached ones (of a model, or "latents"), shapes, and the bytes that have to be moved:
    new numbers read, and written as they are kept."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.dispatch import compiling_for
    from maxstack.kernels.paged_attention import append_kv, append_latent, init_cache, init_latent_cache

    rows, entries, dtype = SEQUENCES if tokens == 1 else 4, LENGTH // PAGE, pages
    with compiling_for(chip):
        cache: Any
        if model == "latents":
            new = [jax.ShapeDtypeStruct((rows, tokens, LATENT), jnp.bfloat16)]
            cache = jax.eval_shape(lambda: init_latent_cache(POOL, LATENT, page=PAGE, dtype=dtype))  # type: ignore
        else:
            _, k, h = SERVED[model]
            new = [jax.ShapeDtypeStruct((rows, tokens, k, h), jnp.bfloat16)] * 2
            cache = jax.eval_shape(lambda: init_cache(POOL, k, h, page=PAGE, dtype=dtype))  # type: ignore
    arguments = [
        cache, *new, jax.ShapeDtypeStruct((rows, entries), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    ]  # fmt: skip
    bits = {"bfloat16": 16, "int8": 8, "int4": 4}[pages]
    numbers = sum(each.size for each in new)
    scales = 0 if pages == "bfloat16" else 4 * sum(each.size // each.shape[-1] for each in new)
    return append_latent if model == "latents" else append_kv, arguments, numbers * (2 + bits / 8) + scales


def cross_entropy_of(model: str, masked: bool) -> tuple[Callable, list, float, float]:
    """The loss of TRAINED tokens and its gradients; `masked` gives weights, of which some may be 0."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.cross_entropy import cross_entropy

    d = WIDTHS[model]

    def both(x, w, labels, weights):
        weights = weights if masked else None
        return jax.value_and_grad(lambda x, w: cross_entropy(x, w, labels, weights)[0], argnums=(0, 1))(x, w)

    arguments = [
        jax.ShapeDtypeStruct((TRAINED, d), jnp.bfloat16), jax.ShapeDtypeStruct((d, VOCABULARY), jnp.bfloat16),
        jax.ShapeDtypeStruct((TRAINED,), jnp.int32), jax.ShapeDtypeStruct((TRAINED,), jnp.float32),
    ]  # fmt: skip
    # x and w in, their gradients out.
    return both, arguments, 6.0 * TRAINED * d * VOCABULARY, 4.0 * d * (TRAINED + VOCABULARY)


def quantized_of(
    weights: str, tokens: int, matrix: str, activations: Any = "float"
) -> tuple[Callable, list, float, float]:
    """A product, its shapes, its FLOPs and the bytes that it has to move."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.quantized_matmul import QuantizedWeight, quantized_matmul

    inputs, outputs = MATRICES[matrix]
    group = inputs if weights == "int8" else int(weights.partition("-g")[2])
    values, scale = (jnp.int8, jnp.float32) if weights == "int8" else (jnp.int4, jnp.bfloat16)
    w = QuantizedWeight(
        values=jax.ShapeDtypeStruct((outputs, inputs), values), inputs=inputs, group=group, zero=None,
        scale=jax.ShapeDtypeStruct((inputs // group, outputs), scale),
    )  # fmt: skip
    moved = (
        inputs * outputs * w.bits / 8
        + w.scale.size * w.scale.dtype.itemsize
        + 2 * tokens * (inputs + outputs)
    )
    x = jax.ShapeDtypeStruct((tokens, inputs), jnp.bfloat16)
    return (
        lambda x, w: quantized_matmul(x, w, activations=activations),
        [x, w],
        2.0 * tokens * inputs * outputs,
        moved,
    )


def grouped_of(weights: str, rows: int, model: str) -> tuple[Callable, list, float, float]:
    """Rows times their expert's gate, in bfloat16 with both gradients; shapes, FLOPs, and the bytes that have to be
    moved where every expert has rows."""
    import jax
    import jax.numpy as jnp

    from maxstack.kernels.grouped_matmul import grouped_matmul
    from maxstack.kernels.quantized_matmul import quantize

    experts, inputs, outputs = MIXTURES[model]
    x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (inputs, outputs))
    sizes, flops = jax.ShapeDtypeStruct((experts,), jnp.int32), 2.0 * rows * inputs * outputs
    in_and_out = 2 * rows * (inputs + outputs)
    if weights == "bfloat16":
        w = jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.bfloat16)

        def both(x, w, sizes, dy):
            y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
            return y, *pull(dy)

        return both, [x, w, sizes, dy], 3 * flops, 3 * (in_and_out + 2 * experts * inputs * outputs)
    kind: Any = weights
    one = jax.eval_shape(
        lambda w: quantize(w, kind, storage="int4"), jax.ShapeDtypeStruct((outputs, inputs), jnp.float32)
    )
    w = jax.tree.map(lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype), one)
    packed = experts * (inputs * outputs * one.bits / 8 + one.scale.size * one.scale.dtype.itemsize)
    return lambda x, w, sizes: grouped_matmul(x, w, sizes), [x, w, sizes], flops, in_and_out + packed
