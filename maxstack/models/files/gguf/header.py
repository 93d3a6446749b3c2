"""The header of a GGUF file: metadata with types, and where the tensors lie.

"GGUF", version, number of tensors, number of metadata entries; the entries (key, type, value); of each tensor its
name, sizes (the fastest-changing first), type and offset; then, on a multiple of the alignment, the tensors' bytes.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.gguf.cursor import Cursor
from maxstack.models.files.gguf.kinds import BY_NUMBER, KINDS, OTHERS, Kind
from maxstack.models.files.opened import OpenedFile
from maxstack.models.files.source import TensorInfo, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MOST_AXES = 4
MOST_KEY = (1 << 16) - 1
_MOST_ALIGNMENT = 1 << 20
_MOST_NAME = 1024  # ggml itself has room for 63
_MOST_TENSORS = 1 << 17
_MOST_ENTRIES = 1 << 16
_SPLIT = "split.count"

# Types of metadata values by number; a text is 8 and an array 9.
NUMBERS = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool",
    10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
_DTYPES = {number: np.dtype(name).newbyteorder("<") for number, name in NUMBERS.items() if name != "bool"}
_DTYPES[7] = np.dtype(np.uint8)
_STRUCTS = {
    number: struct.Struct("<" + letter) for number, letter in zip(NUMBERS, "BbHhIifBQqd", strict=True)
}
TEXT, ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor, its type, and the byte of the file at which it begins."""

    info: TensorInfo
    kind: Kind
    offset: int


class Header(NamedTuple):
    tensors: dict[str, Tensor]
    """By name, in the order of the file."""
    metadata: dict[str, Any]
    types: dict[str, str]
    """Of the metadata: "uint32", "string", "array[int32]", …"""


def read_header(file: OpenedFile) -> Header:
    """Everything the file says of itself, checked against its size. Raises UserError."""
    cursor = Cursor(file)
    _check_version(file, cursor)
    # The least that a tensor and an entry take: name and number of axes, type, offset; key, type, value.
    tensor_count = cursor.count("the list of tensors", cursor.u64(), 24, _MOST_TENSORS)
    entry_count = cursor.count("the metadata", cursor.u64(), 13, _MOST_ENTRIES)
    metadata, types = _metadata(cursor, entry_count)
    alignment = _alignment(file, metadata, types)
    if metadata.get(_SPLIT, 0) not in (0, 1):
        raise UserError(
            f"{file.path} is one of {metadata[_SPLIT]} parts; join them with `llama-gguf-split --merge` of llama.cpp "
            "and give the result"
        )
    return Header(_tensors(cursor, tensor_count, alignment), metadata, types)


def _check_version(file: OpenedFile, cursor: Cursor) -> None:
    start = file.text(0, 8)
    if start[:4] != MAGIC:
        raise UserError(f"{file.path} is no GGUF file: it begins with {start[:4]!r} where {MAGIC!r} belongs")
    cursor.u32()
    version = cursor.u32()
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UserError(f"{file.path} was written for big-endian machines; only little-endian files are read")
    raise UserError(
        f"{file.path} is GGUF of version {version}; versions {' and '.join(map(str, VERSIONS))} are read. "
        "Convert it with a llama.cpp of its time, or fetch a newer file"
    )


def _metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for _ in range(count):
        key = cursor.text("a key of the metadata", MOST_KEY)
        if key in metadata:
            raise cursor.file.damaged(f"the metadata has {shown(key)} twice")
        metadata[key], types[key] = _value(cursor, f"metadata {shown(key)}", cursor.u32())
    return metadata, types


def _value(cursor: Cursor, what: str, number: int) -> tuple[Any, str]:
    """A value in plain Python (an array as a list) and the word for its type."""
    if number == TEXT:
        return cursor.text(what), "string"
    if number in NUMBERS:
        value = cursor.take(_STRUCTS[number])
        return (_booleans(cursor, what, [value])[0] if NUMBERS[number] == "bool" else value), NUMBERS[number]
    if number != ARRAY:
        raise cursor.file.damaged(f"{what} has type {number}; types are 0 to 12")
    item, count = cursor.u32(), cursor.u64()
    if item == ARRAY:
        raise UserError(
            f"{cursor.file.path}: {what} is an array of arrays, which no model uses; it is not read"
        )
    if item == TEXT:
        cursor.count(what, count, 8)
        return cursor.texts(what, count), "array[string]"
    if item not in NUMBERS:
        raise cursor.file.damaged(f"{what} is an array of type {item}; types are 0 to 12")
    cursor.count(what, count, _DTYPES[item].itemsize)
    values = cursor.numbers(_DTYPES[item], count).tolist()
    return (_booleans(cursor, what, values) if NUMBERS[item] == "bool" else values), f"array[{NUMBERS[item]}]"


def _booleans(cursor: Cursor, what: str, values: list[Any]) -> list[bool]:
    if not {*values} <= {0, 1}:
        raise cursor.file.damaged(f"{what} is neither true nor false")
    return [value == 1 for value in values]


def _alignment(file: OpenedFile, metadata: dict[str, Any], types: dict[str, str]) -> int:
    value = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if (
        types.get(ALIGNMENT_KEY, "uint32") != "uint32"
        or not 1 <= value <= _MOST_ALIGNMENT
        or value & (value - 1)
    ):
        raise file.damaged(f"{ALIGNMENT_KEY} is {shown(value)}, not a power of two up to {_MOST_ALIGNMENT:,}")
    return value


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name", _MOST_NAME)
        if name in found:
            raise cursor.file.damaged(f"tensor {shown(name)} comes twice")
        found[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.position // alignment) * alignment
    placed = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}
    _check_places(cursor.file, placed)
    return placed


def _tensor(cursor: Cursor, name: str, alignment: int) -> Tensor:
    """Sizes, type and offset of one tensor, its offset still counted from the first."""
    axes = cursor.u32()
    if axes > MOST_AXES:
        raise cursor.file.damaged(
            f"tensor {shown(name)} claims {axes:,} axes; {MOST_AXES} is the most there can be"
        )
    sizes = [cursor.u64() for _ in range(axes)]
    number, offset = cursor.u32(), cursor.u64()
    if number not in BY_NUMBER:
        word = OTHERS.get(number, f"number {number}")
        raise UserError(
            f"{cursor.file.path}: tensor {shown(name)} is of type {word}, which is not read; those that are: "
            f"{', '.join(KINDS)}. Make the file again in one of them (llama-quantize of llama.cpp)"
        )
    kind = BY_NUMBER[number]
    if math.prod(filter(None, sizes)) >= 1 << 59:  # a zero among the sizes would hide the others
        raise cursor.file.damaged(f"tensor {shown(name)} has sizes {sizes}, more than memory can be")
    if (sizes[0] if sizes else 1) % kind.elements:
        raise cursor.file.damaged(
            f"tensor {shown(name)} is {kind.name}, in blocks of {kind.elements}, with rows of {sizes[:1]}"
        )
    if offset % alignment:
        raise cursor.file.damaged(f"tensor {shown(name)} begins at {offset}, no multiple of {alignment}")
    return Tensor(TensorInfo(tuple(reversed(sizes)), kind.dtype), kind, offset)


def stored_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor in the file."""
    return math.prod(shape) // kind.elements * kind.nbytes


def _check_places(file: OpenedFile, tensors: dict[str, Tensor]) -> None:
    """Inside the file, and no two in the same place."""
    last, end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        length = stored_bytes(tensor.info.shape, tensor.kind)
        if tensor.offset + length > file.size:
            raise file.damaged(
                f"tensor {shown(name)} reaches from byte {tensor.offset:,} to {tensor.offset + length:,}, "
                f"the file has {file.size:,}; it is cut off"
            )
        if tensor.offset < end and length:
            raise file.damaged(f"the bytes of tensors {shown(last)} and {shown(name)} overlap")
        last, end = name, max(end, tensor.offset + length)
