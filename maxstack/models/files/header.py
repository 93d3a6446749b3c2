"""The header of a safetensors file: eight bytes of length, JSON, then the tensors' bytes without a gap.

{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {"key": "text"}},
offsets counted from the end of the header. https://huggingface.co/docs/safetensors#format
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from maxstack.models.files.opened import OpenedFile
from maxstack.models.files.source import TensorInfo, shown
from maxstack.models.files.strict_json import MOST_BYTES, BadJSON, parse_object

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
CODES = {name: code for code, name in DTYPES.items()}
METADATA = "__metadata__"
_LENGTH = 8
_MOST_AXES = 64  # of a numpy array
_MOST = 1 << 63


class Tensor(NamedTuple):
    """A tensor and the byte of the file at which it begins."""

    info: TensorInfo
    offset: int


class Header(NamedTuple):
    tensors: dict[str, Tensor]
    """By name, in the order of their bytes."""
    metadata: dict[str, str]


def read_header(file: OpenedFile) -> Header:
    """Everything the file says of itself, checked against its size. Raises UserError."""
    if file.size < _LENGTH:
        raise file.damaged(f"it has {file.size} bytes, too few for a safetensors file")
    length = int.from_bytes(file.text(0, _LENGTH), "little")
    if length > MOST_BYTES or length > file.size - _LENGTH:
        raise file.damaged(
            f"its first eight bytes claim a header of {length:,} bytes; the file has {file.size - _LENGTH:,} after "
            f"them, and {MOST_BYTES:,} is the most a header can have. It is cut off, or no safetensors file"
        )
    try:
        fields = parse_object(file.text(_LENGTH, length))
    except BadJSON as error:
        raise file.damaged(f"its header is {error}") from error
    metadata = fields.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise file.damaged(f"{METADATA} of its header is not an object of texts")
    entries = {name: _entry(file, name, value) for name, value in fields.items()}
    return Header(_placed(file, entries, _LENGTH + length), metadata)


def _entry(file: OpenedFile, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    """Dtype, shape and offsets of one tensor, which agree with each other."""

    def wrong(what: str) -> Exception:
        return file.damaged(f"the header's entry of {shown(name)} has {what}")

    if not isinstance(value, dict):
        raise wrong("no object")
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise wrong(f"dtype {shown(code)}; those that can be read are {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > _MOST_AXES:
        raise wrong(f"shape {shown(shape)}, not a list of at most {_MOST_AXES} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {shown(offsets)}, not where it begins and ends")
    info = TensorInfo(tuple(shape), DTYPES[code])
    if (
        math.prod(filter(None, shape)) >= _MOST // 16
    ):  # a zero among the sizes hides the others from the next check
        raise wrong(f"shape {shown(shape)}, more than memory can be")
    if info.nbytes != offsets[1] - offsets[0]:
        raise wrong(
            f"{offsets[1] - offsets[0]:,} bytes; its shape {shown(list(shape))} in {code} has {info.nbytes:,}"
        )
    return info, offsets[0], offsets[1]


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of integers that a size or an offset can be; true is no integer here."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MOST for size in value)


def _placed(
    file: OpenedFile, entries: Mapping[str, tuple[TensorInfo, int, int]], start: int
) -> dict[str, Tensor]:
    """The tensors in the order of their bytes, which lie end to end up to the end of the file."""
    tensors, last, end = {}, "", 0
    for name, (info, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin < end:
            raise file.damaged(f"the bytes of tensors {shown(last)} and {shown(name)} overlap")
        if begin > end:
            raise file.damaged(f"{begin - end:,} bytes before tensor {shown(name)} belong to none")
        tensors[name] = Tensor(info, start + begin)
        last, end = name, stop
    if start + end != file.size:
        what = "cut off" if start + end > file.size else "longer than what its header describes"
        raise file.damaged(f"it is {what}: {start + end:,} bytes by its header, {file.size:,} on the disk")
    return tensors


def make_header(tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON for tensors that follow end to end; padded so that the first begins on a multiple of eight."""
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, info in tensors:
        begin, end = end, end + info.nbytes
        fields[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text
