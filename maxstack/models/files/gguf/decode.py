"""Blocks of 32 elements to float32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4.

Each function takes blocks [n, bytes] uint8 and fills out [n, 32] float32. A block begins with its scale (and its
minimum) as float16; of a byte with two elements the low half is element i and the high half element i + 16. Layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import numpy as np

_HALF = 16
_FOUR_BIT_FLOATS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def half(blocks: np.ndarray, start: int) -> np.ndarray:
    """[n, 1] float32 of the float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks[:, 2:]
    np.subtract(packed & 15, 8, out=out[:, :_HALF], dtype=np.float32)
    np.subtract(packed >> 4, 8, out=out[:, _HALF:], dtype=np.float32)
    out *= half(blocks, 0)


def q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks[:, 4:]
    out[:, :_HALF] = packed & 15
    out[:, _HALF:] = packed >> 4
    out *= half(blocks, 0)
    out += half(blocks, 2)


def q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16, out=out, dtype=np.float32)
    out *= half(blocks, 0)


def q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    out *= half(blocks, 0)
    out += half(blocks, 2)


def q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), half(blocks, 0), out=out, dtype=np.float32)


def mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    """Numbers of four bits (a sign, two of the exponent, one of the mantissa) with a power of two for each block
    (OCP Microscaling Formats, version 1.0)."""
    packed = blocks[:, 1:]
    out[:, :_HALF] = _FOUR_BIT_FLOATS[packed & 15]
    out[:, _HALF:] = _FOUR_BIT_FLOATS[packed >> 4]
    out *= np.ldexp(np.float32(1.0), blocks[:, :1].astype(np.int32) - 127)


def _five_bits(fifth: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """[n, 32] values 0 to 31: bit i of the four bytes `fifth` is the highest one of element i."""
    values = np.unpackbits(fifth, axis=1, bitorder="little")
    values <<= 4
    values[:, :_HALF] |= packed & 15
    values[:, _HALF:] |= packed >> 4
    return values
