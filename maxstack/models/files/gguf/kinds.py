"""The types of tensors that a GGUF file can have: numbers, sizes and how their blocks are decoded and made."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from maxstack.models.files.gguf import decode, decode_k, encode

Decode = Callable[[np.ndarray, np.ndarray], None]
Encode = Callable[[np.ndarray], np.ndarray]


class Kind(NamedTuple):
    """One type of tensor. A block is so many consecutive elements of a row."""

    name: str
    number: int
    """As ggml counts them."""
    elements: int
    """Of a block."""
    nbytes: int
    """Of a block."""
    dtype: str
    """What is read: "float32" where blocks are decoded."""
    decode: Decode | None = None
    """decode(blocks [n, nbytes] uint8, out [n, elements] float32); None where the bytes are the array."""
    encode: Encode | None = None
    """encode(values [n, elements] float32) -> [n, nbytes] uint8; None where none is made here."""


_ALL = (
    Kind("F32", 0, 1, 4, "float32", encode=encode.f32),
    Kind("F16", 1, 1, 2, "float16", encode=encode.f16),
    Kind("Q4_0", 2, 32, 18, "float32", decode.q4_0, encode.q4_0),
    Kind("Q4_1", 3, 32, 20, "float32", decode.q4_1),
    Kind("Q5_0", 6, 32, 22, "float32", decode.q5_0),
    Kind("Q5_1", 7, 32, 24, "float32", decode.q5_1),
    Kind("Q8_0", 8, 32, 34, "float32", decode.q8_0, encode.q8_0),
    Kind("Q2_K", 10, 256, 84, "float32", decode_k.q2_k),
    Kind("Q3_K", 11, 256, 110, "float32", decode_k.q3_k),
    Kind("Q4_K", 12, 256, 144, "float32", decode_k.q4_k),
    Kind("Q5_K", 13, 256, 176, "float32", decode_k.q5_k),
    Kind("Q6_K", 14, 256, 210, "float32", decode_k.q6_k),
    Kind("I8", 24, 1, 1, "int8"),
    Kind("I16", 25, 1, 2, "int16"),
    Kind("I32", 26, 1, 4, "int32"),
    Kind("I64", 27, 1, 8, "int64"),
    Kind("F64", 28, 1, 8, "float64"),
    Kind("BF16", 30, 1, 2, "bfloat16", encode=encode.bf16),
    Kind("MXFP4", 39, 32, 17, "float32", decode.mxfp4),
)
KINDS = {kind.name: kind for kind in _ALL}
BY_NUMBER = {kind.number: kind for kind in _ALL}

# Known by name, for the message that says they are not read.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip
