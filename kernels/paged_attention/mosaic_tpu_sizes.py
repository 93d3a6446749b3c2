"""How the TPU kernel of attention over pages cuts a call: query rows and kv heads of a piece, pages in flight."""

import math

import jax.numpy as jnp

from maxstack.kernels import dispatch, tiles

SLOTS, CHUNK_SLOTS = 4, 8
"""Pages in flight. Fewer, where pages are large, so that they take at most `RING_BYTES`. A piece of a chunk copies the
pages of some heads, which are small."""
RING_BYTES = 8 << 20
"""Of 16 MiB that a kernel may use on a v5e unless it asks for more."""
MOST_ROWS = 128
"""Query rows of a piece; a matrix unit has 128 (v5) or 256 (v6e, v7x) columns."""
SHORT = 8
"""Queries of one piece of work, such as guesses to verify; more may be a chunk."""
CHUNK_ROWS = 2048
"""Query rows of a kv head in a piece of a chunk, at most. Products and copies of bfloat16 pages take equally long at
500 or so on a v6e; each further halving of the pieces halves the bytes."""
CHUNK_BYTES = 7 << 20
"""What queries, results and sums of a piece of a chunk may take in VMEM."""
LANES = 128
TWO_CORES = ("v4", "v5p")


def is_chunk(q_btnh, kv_heads: int) -> bool:
    """More rows than a piece of a decoding step has, of more than a few queries."""
    _, t, n, _ = q_btnh.shape
    return t > SHORT and t * (n // kv_heads) > MOST_ROWS


def step(group: int) -> int:
    """Queries whose rows fill lanes."""
    return LANES // math.gcd(LANES, group)


def sizes_for(q_btnh, pools, page: int, value_size: int, out_dtype) -> tiles.Sizes:
    """Query rows and kv heads of a piece, and pages in flight: what the tables have, else as said above."""
    b, t, n, h = q_btnh.shape
    kv_heads = pools[0].shape[1]
    chunk = is_chunk(q_btnh, kv_heads)
    whole = step(n // kv_heads) * (n // kv_heads)  # rows that fill lanes
    row = _chunk_row_bytes(h, value_size, out_dtype)
    divisors = [heads for heads in range(kv_heads, 0, -1) if kv_heads % heads == 0]

    def held(rows: int) -> int:
        """Bytes of a kv head of a piece."""
        return min(rows, -(-t * (n // kv_heads) // whole) * whole) * row

    def slots(heads: int) -> int:
        most = CHUNK_SLOTS if chunk else SLOTS
        return max(2, min(most, RING_BYTES // page_bytes(pools, heads)))

    rule = {"rows": MOST_ROWS, "heads": kv_heads}
    if chunk:
        rows = max(whole, min(CHUNK_ROWS, CHUNK_BYTES // row) // whole * whole)
        apart = dispatch.chip().name in TWO_CORES and kv_heads % 2 == 0
        fit = [heads for heads in divisors[apart:] if heads * held(rows) <= CHUNK_BYTES]
        rule = {"rows": rows, "heads": fit[0] if fit else 1}
    rule["slots"] = slots(rule["heads"])
    shape = {"b": tiles.about(b), "t": t, "n": n, "k": kv_heads, "h": h, "p": page}
    axes: dict[str, tuple[int, ...]] = {"rows": (64, 128, 256), "slots": (2, 3, 4, 6, 8)}
    if chunk:
        axes |= {"rows": (512, 1024, 2048), "heads": tuple(divisors)}

    def fault(sizes: tiles.Sizes) -> str | None:
        slots, heads = sizes["slots"], sizes["heads"]
        if kv_heads % heads or (not chunk and heads != kv_heads):
            return f"{heads} kv heads of a piece; it takes {divisors if chunk else kv_heads}"
        if chunk and held(sizes["rows"]) * heads > max(CHUNK_BYTES, whole * row):
            return (
                f"{sizes['rows']} rows of {heads} kv heads, {row} bytes each; it takes {CHUNK_BYTES} at most"
            )
        size = page_bytes(pools, heads)
        if slots < 2 or slots * size > max(RING_BYTES, 2 * size):
            return f"{slots} pages of {size} bytes in flight; it takes 2 at least, and {RING_BYTES} bytes at most"
        return None

    return tiles.chosen("paged_attention.mosaic_tpu", pools[0].dtype, shape, rule, axes=axes, fault=fault)


def _chunk_row_bytes(h: int, value_size: int, out_dtype) -> int:
    """VMEM of a query row of a chunk: two of queries and results, one of sums."""
    wide = -(-h // LANES) * LANES
    return 2 * wide * 2 + (2 * jnp.dtype(out_dtype).itemsize + 4) * -(-value_size // LANES) * LANES + 32


def page_bytes(pools, heads: int) -> int:
    """What a piece of some kv heads copies of a page: scales of all heads, which are a tile."""
    pages, kv_heads = pools[0].shape[:2]
    cut = {4: kv_heads // heads, 3: 1}
    return sum(_bytes(pool) // cut[pool.ndim] for pool in pools) // pages


def _bytes(pool) -> int:
    return pool.size * (4 if pool.dtype == jnp.int4 else 8 * pool.dtype.itemsize) // 8
