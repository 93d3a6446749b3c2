"""Reading SentencePiece's tokenizer.model: a protocol buffer, of which a few fields matter.

Field numbers and defaults are those of sentencepiece_model.proto in the SentencePiece repository.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maxstack.config import UserError


class Kind(enum.IntEnum):
    """What a piece is; GGUF numbers its tokens' types the same."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: Kind


class Algorithm(enum.IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model; -1 for a special piece that there is not."""

    pieces: tuple[Piece, ...]
    algorithm: Algorithm
    byte_fallback: bool = False
    space_as_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    """Precompiled rules of the normalizer; empty for none."""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True


def read_sentencepiece(file: Path) -> SentencePiece:
    """Raises UserError for a file that is no SentencePiece model."""
    try:
        return parse_sentencepiece(file.read_bytes())
    except (ValueError, struct.error) as error:
        raise UserError(
            f"{file} is no SentencePiece model: {error}. Some models keep another kind of file under this name; "
            "give a folder with tokenizer.json (transformers' save_pretrained writes one)"
        ) from error


def parse_sentencepiece(data: bytes) -> SentencePiece:
    """Raises ValueError for bytes that are no such model."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is a number")
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer |= dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer |= dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise ValueError("its normalizer's rules are a number")
    return SentencePiece(
        pieces=tuple(pieces), algorithm=Algorithm(_signed(trainer.get(3, 1))),
        byte_fallback=bool(trainer.get(35, 0)), space_as_suffix=bool(trainer.get(24, 0)),
        unk_id=_signed(trainer.get(40, 0)), bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)), pad_id=_signed(trainer.get(43, -1)),
        charsmap=charsmap, dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)), escape_spaces=bool(normalizer.get(5, 1)),
    )  # fmt: skip


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece has a number for its text")
    return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(_signed(fields.get(3, 1))))


def _signed(value: int | bytes) -> int:
    """A varint as an int32."""
    if isinstance(value, bytes):
        raise ValueError("a number is a text")
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for a varint, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
        if size < 0 or at + size > len(data):
            raise ValueError(f"byte {at} begins a field of type {kind} and {size} bytes, of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where it ends."""
    value = 0
    for index in range(10):
        if at + index >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[at + index]
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"byte {at} begins a number without end")
