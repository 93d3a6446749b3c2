"""Superblocks of 256 elements to float32: Q2_K to Q6_K.

Each function takes blocks [n, bytes] uint8 and fills out [n, 256] float32. A superblock has 16 groups of 16 (or 8 of
32), each with a small integer scale (and minimum) of its own, which are multiples of float16 ones. Layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import numpy as np

from maxstack.models.files.gguf.decode import half

# Shifts of the four pairs of bits of a byte, and of its eight bits.
_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, packed, d, d_min = blocks[:, :16], blocks[:, 16:80], half(blocks, 80), half(blocks, 82)
    groups = out.reshape(-1, 16, 16)
    groups[:] = _two_bits(packed).reshape(groups.shape)
    groups *= (d * (scales & 15))[..., None]
    groups -= (d_min * (scales >> 4))[..., None]


def q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    third, packed, scales, d = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108], half(blocks, 108)
    values = _two_bits(packed).reshape(-1, 8, 32)
    values |= ((third[:, None] >> _BITS) & 1) << 2
    groups = out.reshape(-1, 16, 16)
    np.subtract(values.reshape(groups.shape), 4, out=groups, dtype=np.float32)
    groups *= (d * _six_bit_scales(scales))[..., None]


def q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    groups = out.reshape(-1, 4, 2, 32)
    groups[:, :, 0] = packed & 15
    groups[:, :, 1] = packed >> 4
    _scale_and_shift(blocks, out)


def q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    fifth, packed = blocks[:, 16:48], blocks[:, 48:].reshape(-1, 4, 32)
    values = ((fifth[:, None] >> _BITS) & 1) << 4
    pairs = values.reshape(-1, 4, 2, 32)
    pairs[:, :, 0] |= packed & 15
    pairs[:, :, 1] |= packed >> 4
    out.reshape(values.shape)[:] = values
    _scale_and_shift(blocks, out)


def q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    values = ((high >> _PAIRS) & 3) << 4
    values[:, :, :2] |= low & 15
    values[:, :, 2:] |= low >> 4
    groups = out.reshape(-1, 16, 16)
    np.subtract(values.reshape(groups.shape), 32, out=groups, dtype=np.float32)
    groups *= (half(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """[n, 2, 4, 32] from 64 bytes: of each 32 bytes, first the lowest two bits of all, then the next two, …"""
    return (packed.reshape(-1, 2, 1, 32) >> _PAIRS) & 3


def _six_bit_scales(packed: np.ndarray) -> np.ndarray:
    """[n, 16] from -32 to 31: eight bytes of low halves, then four with the upper two bits of four scales each."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> _PAIRS) & 3
    return np.subtract(low | high.reshape(low.shape) << 4, 32, dtype=np.float32)


def _scale_and_shift(blocks: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K begin alike: two float16, then eight scales and eight minimums of six bits in twelve bytes."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    groups = out.reshape(-1, 8, 32)
    groups *= (half(blocks, 0) * scales)[..., None]
    groups -= (half(blocks, 2) * minimums)[..., None]


def _scales_and_minimums(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two [n, 8], 0 to 63. The first four of each have their own bytes, whose upper two bits belong to the others."""
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 63, (rest & 15) | (scale >> 6) << 4], axis=1)
    minimums = np.concatenate([minimum & 63, rest >> 4 | (minimum >> 6) << 4], axis=1)
    return scales, minimums
