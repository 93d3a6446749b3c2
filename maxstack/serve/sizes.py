"""Limits that fit the machine."""

import logging

import jax
import psutil

from maxstack.kernels import cpu_native
from maxstack.kernels.paged_attention import PageType
from maxstack.models.attention import AttentionConfig
from maxstack.models.paged.pools import page_bytes
from maxstack.models.remat import platform
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve.plan import Limits, Shape, places
from maxstack.sharding import mesh_of

log = logging.getLogger(__name__)

PAGE = {"cpu": 64}
"""Tokens a page: small ones share more of a prompt. Kernels for accelerators want `KERNEL_PAGE`."""
KERNEL_PAGE = 128
ROWS = {"cpu": 32}
ACCELERATOR_ROWS = 256
CHUNKS = {"cpu": ((1, 32), (8, 32), (1, 256))}
SIDE_BY_SIDE = ((4, 32, 32), (16, 256, 256))
"""On a CPU with C++: no padding between the rows of a chunk."""
INVARIANT_CHUNK = {"cpu": (1, 64)}
"""The only one of invariant mode: a CPU pays for padding, accelerators for every time that they read the weights."""
ACCELERATOR_INVARIANT_CHUNK = (2, 256)
ACCELERATOR_CHUNKS = ((1, 128), (1, 512), (4, 512), (8, 128))
MOST_LENGTH = 8192
"""Tokens of a sequence, where the model allows more and nobody asks for them."""
SHARE = {"cpu": 0.1}
"""Of the memory, for the cache: of all that a CPU has, and no more than half of what is free; of what a device has
left."""
ACCELERATOR_SHARE = 0.85


def default_limits(
    config: TransformerConfig, kv_dtype: PageType, *, rows: int | None = None, max_length: int | None = None,
    grid: bool = False, invariant: bool = False,
) -> Limits:  # fmt: skip
    """Rows, pages and shapes for the platform at hand: as many pages as fit, no more than all rows can use. `grid`
    keeps to shapes that any form of the programs computes, `invariant` to one."""
    here = platform()
    page, rows = PAGE.get(here, KERNEL_PAGE), rows or ROWS.get(here, ACCELERATOR_ROWS)
    length = max_length or min(config.max_length, MOST_LENGTH)
    bytes_a_page = page_bytes(config, page, kv_dtype)
    share = SHARE.get(here, ACCELERATOR_SHARE)
    fitting = stable(int(share_bytes(share)) // bytes_a_page)
    most = rows * -(-length // page)
    pages = max(min(fitting, most), -(-length // page))
    chunks: tuple[Shape, ...] = CHUNKS.get(here, ACCELERATOR_CHUNKS)
    if not grid and here == "cpu" and cpu_native.available() and keeps_keys(config):
        chunks = SIDE_BY_SIDE
    if invariant:
        chunks = (INVARIANT_CHUNK.get(here, ACCELERATOR_INVARIANT_CHUNK),)
    log.info("cache: %d pages of %d tokens, %.1f MB", pages, page, pages * bytes_a_page / 1e6)
    return Limits(
        rows=rows, page=page, pages=pages, max_length=length, chunks=chunks,
        tokens_a_step=rows + max(map(places, chunks)), invariant=invariant,
    )  # fmt: skip


def limits_for(
    model: Transformer, kv_dtype: PageType, on: str | None = None, draft: Transformer | None = None,
    invariant: bool = False,
) -> Limits:  # fmt: skip
    """Those of a model where it lies, in the form for a platform, perhaps with a draft model."""
    grid = mesh_of(model) is not None or draft is not None or (on or "cpu") != "cpu"
    return default_limits(model.config, kv_dtype, grid=grid, invariant=invariant)


def keeps_keys(config: TransformerConfig) -> bool:
    """Whether every layer keeps keys and values, which C++ reads, and no latents."""
    blocks = [block for stack in config.stacks for block in stack.pattern]
    return all(isinstance(block.attention, AttentionConfig) for block in blocks)


def stable(pages: int) -> int:
    """Fewer pages, by a sixteenth at most: programs are compiled for a number of them, and what is free differs a
    little from one start to the next."""
    return pages & -(1 << max(0, pages.bit_length() - 4))


def share_bytes(share: float) -> float:
    """Bytes for the cache: of the first device, or of this machine."""
    told = None if platform() == "cpu" else jax.local_devices()[0].memory_stats()
    if told and "bytes_limit" in told:
        return share * (told["bytes_limit"] - told["bytes_in_use"])
    memory = psutil.virtual_memory()
    return min(share * memory.total, memory.available / 2)
