"""Files for these tests, made by hand: the bytes of a format without the code that is tested."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


def safetensors_bytes(fields: dict | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, as an object or as text, true or not."""
    text = (
        fields
        if isinstance(fields, bytes)
        else (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    )
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def field(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_bytes(
    entries: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, magic: bytes = b"GGUF",
    version: int = 3, tensor_count: int | None = None, entry_count: int | None = None, alignment: int = 32,
) -> bytes:  # fmt: skip
    """A GGUF file, true or not."""
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    entry_count = len(entries) if entry_count is None else entry_count
    head = magic + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % alignment) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry: number of its type, and its bytes."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """The description of a GGUF tensor, sizes in ggml's order."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def floats(count: int) -> bytes:
    return np.arange(count, dtype=np.float32).tobytes()
