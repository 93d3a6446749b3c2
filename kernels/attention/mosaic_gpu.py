"""Attention in Mosaic GPU (Hopper): not built yet."""

from maxstack.kernels import Unsupported
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.dispatch import only_on


def declined(q_btnh, k_bskh, v_bskw, options: Options, at: Coordinates, config: object) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    return only_on("gpu") or "it is not built yet"


def attention(options: Options, config, layout, q_btnh, k_bskh, v_bskw, sinks_n, at: Coordinates):
    """As `xla.attention`."""
    raise Unsupported("attention: 'mosaic_gpu' is not built yet; use 'xla' (or 'auto')")
