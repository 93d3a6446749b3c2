"""Pages on a CPU, in C++: each byte that a query sees is read once, in any type of page.

What a query gets does not depend, to the last bit, on the other queries of its chunk, on other sequences, nor on the
number of threads: unless `splits` is given, parts of a sequence begin at the same positions whatever its length.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native
from maxstack.kernels.dispatch import only_on
from maxstack.kernels.paged_attention.cache import KVCache, LatentCache
from maxstack.kernels.paged_attention.plan import Options
from maxstack.kernels.sharded import varying, varying_over


def declined(q_btnh, cache: KVCache | LatentCache, value_size: int) -> str | None:
    """Why it cannot serve a call; None where it can."""
    if (reason := only_on("cpu")) is not None:
        return reason
    if isinstance(cache, LatentCache):
        return "it reads keys and values, no latents"
    if cache.k_pages.dtype == jnp.int4:
        return "it reads two int4 of a byte: make the cache with init_cache on the CPU"
    return cpu_native.problem()


def default_splits(q_btnh, cache, table_pages: int) -> int:
    """0: parts of its own size."""
    return 0


def paged_attention(
    q_btnh: Float[Array, "b t n h"], cache: KVCache, table_bp: Int[Array, "b p"], lengths_b: Int[Array, "b"],
    options: Options, value_size: int,
) -> tuple[Float[Array, "s b t n w"], Float[Array, "s b t n"]]:  # fmt: skip
    """Output and log-sum-exp in float32, as one part: it merges its own. The table holds pages or -1."""
    arrays = (q_btnh, table_bp, lengths_b, *(pool for pool in cache if pool is not None))
    found = cpu_native.paged_attention(
        q_btnh.astype(jnp.float32), *cache, table_bp, lengths_b, scale=options.scale, softcap=options.softcap,
        window=options.window, splits=options.splits,
    )  # fmt: skip
    # What calls out of XLA does not say over which axes its result varies.
    out, lse = varying_over(frozenset().union(*map(varying, arrays)), found)
    return out[None], lse[None]
