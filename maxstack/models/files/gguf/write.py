"""Writing a GGUF file, one tensor in memory at a time."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.gguf.header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    MAGIC,
    MOST_AXES,
    NUMBERS,
    TEXT,
    VERSIONS,
    stored_bytes,
)
from maxstack.models.files.gguf.kinds import KINDS
from maxstack.models.files.source import TensorInfo, check_array, dtype_of
from maxstack.models.files.whole import pieces, written_whole

_BY_NAME = {name: number for number, name in NUMBERS.items()}
_MOST_NAME = 63  # bytes, of GGML_MAX_NAME = 64 with a zero at the end


class Export(NamedTuple):
    """A tensor to be written: its array, in any floating type, is asked for when its turn comes."""

    name: str
    info: TensorInfo
    """Shape in numpy's order, and dtype, of the array that is given."""
    kind: str
    """As what it is written: "F32", "F16", "BF16", "Q8_0" or "Q4_0"."""
    array: Callable[[], np.ndarray]


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Iterable[Export], *, alignment: int = ALIGNMENT
) -> None:
    """Write a GGUF file (version 3) that appears under its name when it is whole.

    Metadata: text, bool, int (uint32 where it fits, else int32, uint64 or int64), float (float32), a list of one of
    these (integers as int32 where they fit), or a numpy scalar or array for a type of one's own choice.

    Raises UserError when the file exists, rows are no multiple of the type's block, or a value does not fit its type;
    RunError when the disk is full; ValueError for arrays other than announced and metadata of no type.
    """
    tensors = _checked(tensors)
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another name")
    fields = {**metadata, **({ALIGNMENT_KEY: np.uint32(alignment)} if alignment != ALIGNMENT else {})}
    head = _header(fields, tensors, alignment)
    with written_whole(path.parent) as partial, (partial / path.name).open("wb") as file:
        file.write(head + _padding(len(head), alignment))
        for tensor in tensors:
            _write_tensor(file, tensor)
            file.write(_padding(stored_bytes(tensor.info.shape, KINDS[tensor.kind]), alignment))


def _checked(tensors: Iterable[Export]) -> list[Export]:
    found: dict[str, Export] = {}
    for tensor in tensors:
        name, info, kind, _ = tensor
        if kind not in KINDS or KINDS[kind].encode is None:
            raise UserError(
                f"GGUF files of type {kind} are not written; those that are: {', '.join(_written())}"
            )
        if name in found or len(name.encode()) > _MOST_NAME:
            raise ValueError(f"tensor {name}: comes twice, or its name is longer than {_MOST_NAME} bytes")
        if not 1 <= len(info.shape) <= MOST_AXES or 0 in info.shape:
            raise ValueError(
                f"tensor {name}: shape {list(info.shape)}; GGUF has 1 to {MOST_AXES} axes, none empty"
            )
        if info.shape[-1] % KINDS[kind].elements:
            raise UserError(
                f"tensor {name} has rows of {info.shape[-1]}; {kind} packs {KINDS[kind].elements} at a time. "
                "Write this tensor as F32, F16 or BF16"
            )
        found[name] = tensor
    return list(found.values())


def _written() -> list[str]:
    return [name for name, kind in KINDS.items() if kind.encode is not None]


def _write_tensor(file: BinaryIO, tensor: Export) -> None:
    kind, array = KINDS[tensor.kind], np.asarray(tensor.array())
    check_array(tensor.name, tensor.info, array)
    encode = kind.encode
    if (kind.decode is None and array.dtype == dtype_of(kind.dtype)) or encode is None:
        file.writelines(piece.view(np.uint8) for piece in pieces(array))  # as it is
        return
    for piece in pieces(array, kind.elements):
        values = piece.astype(np.float32, copy=False).reshape(-1, kind.elements)
        try:
            file.write(encode(values))
        except ValueError as error:
            raise UserError(
                f"tensor {tensor.name} as {kind.name}: {error}; write it as BF16 or F32"
            ) from error


def _header(metadata: Mapping[str, Any], tensors: Sequence[Export], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        number, data = _value(key, value)
        parts += [_text(key), struct.pack("<I", number), data]
    offset = 0
    for tensor in tensors:
        shape, kind = tensor.info.shape, KINDS[tensor.kind]
        parts += [_text(tensor.name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", kind.number, offset))
        length = stored_bytes(shape, kind)
        offset += length + len(_padding(length, alignment))
    return b"".join(parts)


def _value(key: str, value: Any) -> tuple[int, bytes]:
    """Number of the type, and the bytes."""
    if isinstance(value, str):
        return TEXT, _text(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return ARRAY, struct.pack("<IQ", TEXT, len(value)) + b"".join(map(_text, value))
    array = _numbers(key, value)
    number = _BY_NAME.get(array.dtype.name)
    if number is None or array.ndim > 1:
        raise ValueError(f"metadata {key}: {array.dtype} with {array.ndim} axes has no type in GGUF")
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return (ARRAY, struct.pack("<IQ", number, array.size) + data) if array.ndim else (number, data)


def _numbers(key: str, value: Any) -> np.ndarray:
    """An array, or one without axes, of the type in which it is written."""
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    items = value if isinstance(value, (list, tuple)) else [value]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return np.asarray(value, np.bool_)
    if kinds == {float} or kinds == {float, int}:
        return np.asarray(value, np.float32)
    if kinds == {int}:
        order = (
            ("int32", "uint32", "int64", "uint64")
            if items is value
            else ("uint32", "int32", "uint64", "int64")
        )
        for name in order:
            limits = np.iinfo(name)
            if all(limits.min <= item <= limits.max for item in items):
                return np.asarray(value, name)
    raise ValueError(f"metadata {key}: {value!r} has no type in GGUF; give a numpy array for an empty list")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(length: int, alignment: int) -> bytes:
    return bytes(-length % alignment)
