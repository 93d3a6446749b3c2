"""float32 to blocks, rounded as llama.cpp does: `quantize_row_*_ref` of ggml-quants.c.

Each function takes values [n, elements of a block] float32 and returns blocks [n, bytes] uint8. ValueError for what
the type cannot hold, completed by the caller with the tensor's name.
"""

import ml_dtypes
import numpy as np


def f32(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def f16(values: np.ndarray) -> np.ndarray:
    return _to_half(values).view(np.uint8)


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).view(np.uint8)


def q8_0(values: np.ndarray) -> np.ndarray:
    """Scale: the largest magnitude / 127. Halves are rounded away from zero, as C's roundf does."""
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scales = _to_half(d)  # refuses NaN and infinities before they are computed with
    scaled = values * _inverse(d)
    whole = np.trunc(scaled)
    whole += np.copysign(np.abs(scaled - whole) >= 0.5, scaled)
    return np.concatenate([scales.view(np.uint8), whole.astype(np.int8).view(np.uint8)], axis=1)


def q4_0(values: np.ndarray) -> np.ndarray:
    """Scale: the value of largest magnitude / -8, so that it becomes 0 of 0 … 15 exactly, and zero becomes 8."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)
    d = largest / np.float32(-8)
    scales = _to_half(d)
    numbers = np.minimum(values * _inverse(d) + np.float32(8.5), 15).astype(np.uint8)
    return np.concatenate([scales.view(np.uint8), numbers[:, :16] | numbers[:, 16:] << 4], axis=1)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is zero or so small that the block is zero in float16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isinf(inverse), np.float32(0), inverse)


def _to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        worst = np.abs(values).max()
        raise ValueError(f"a magnitude or scale of {worst:.4g}, which float16 cannot hold (65,504 at most)")
    return halves
