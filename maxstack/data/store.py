"""The prepared format: a folder of memory-mapped arrays and a `meta.json`. See docs/data.md for the layout.

meta.json               format version, settings, counts, size and sha256 of each file
tokenizer/              the tokenizer the ids belong to
SPLIT.tokens.NNN.bin    little-endian uint16 or uint32 ids, document after document; a document lies in one file
SPLIT.offsets.bin       uint64, documents + 1: where each document starts, counted in tokens over all files
SPLIT.origins.bin       uint32 pairs: index into meta's `inputs`, line (or row) number
held_out.text.bin       the text of the held-out documents, UTF-8, one after the other
held_out.text_offsets.bin   uint64, documents + 1: where each text starts, in bytes
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "maxstack-prepared"
VERSION = 1
META = "meta.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "held_out")


class Split:
    """The documents of one split, read from memory maps."""

    def __init__(self, folder: Path, name: str, meta: dict[str, Any]):
        counts = meta["splits"][name]
        self.name = name
        self.documents: int = counts["documents"]
        self.tokens: int = counts["tokens"]
        self.bytes: int = counts["bytes"]
        """Bytes of text, in UTF-8."""
        self._folder = folder
        self._dtype = np.dtype(meta["dtype"])
        self._shards: list[dict[str, Any]] = counts["shards"]
        self._inputs: list[str] = meta["inputs"]

    @cached_property
    def offsets(self) -> np.ndarray:
        """uint64 `[documents + 1]`: where each document starts, in tokens."""
        return _map(self._folder / f"{self.name}.offsets.bin", "<u8")

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [_map(self._folder / shard["file"], self._dtype) for shard in self._shards]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(shard["tokens"] for shard in self._shards)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of one document, counted over the whole split; a view, not a copy."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        base = int(self._starts[shard])
        return self._maps[shard][start - base : stop - base]

    def document(self, index: int) -> np.ndarray:
        """Tokens of a document, with its begin and end ids."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def origin(self, index: int) -> str:
        """ "file:line" a document was read from."""
        file, line = _map(self._folder / f"{self.name}.origins.bin", "<u4").reshape(-1, 2)[index]
        return f"{self._inputs[file]}:{line}"

    @cached_property
    def text_offsets(self) -> np.ndarray:
        """uint64 `[documents + 1]`: where each held-out document's text starts, in bytes."""
        return _map(self._folder / f"{self.name}.text_offsets.bin", "<u8")

    def text(self, index: int) -> str:
        """Text of a held-out document."""
        raw = _map(self._folder / f"{self.name}.text.bin", "u1")
        return (
            raw[int(self.text_offsets[index]) : int(self.text_offsets[index + 1])].tobytes().decode("utf-8")
        )


class PreparedSource:
    """A prepared folder, opened: nothing but `meta.json` and file sizes is read until asked for."""

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.name: str = name or self.meta["name"]
        self.fingerprint: str = self.meta["fingerprint"]
        """Of the content: tokens, order of documents, tokenizer; the same on every machine."""
        self.train = Split(self.folder, "train", self.meta)
        self.held_out = Split(self.folder, "held_out", self.meta)
        _check_sizes(self.folder, self.meta)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the ids belong to."""
        return load_tokenizer(self.folder / TOKENIZER)

    def held_out_text(self) -> bytes:
        """All held-out text, UTF-8: what a compressor is given for comparison."""
        return (self.folder / "held_out.text.bin").read_bytes()

    def verify(self) -> None:
        """Read every file and compare its sha256; UserError names the first that differs."""
        for name, expected in self.meta["files"].items():
            if file_sha256(self.folder / name) != expected["sha256"]:
                raise UserError(
                    f"{self.folder / name} is damaged: its sha256 differs from meta.json; {_AGAIN}"
                )

    def __reduce__(self):
        return PreparedSource, (self.folder, self.name)  # memory maps are opened again, not copied

    def __repr__(self) -> str:
        return f"PreparedSource({self.name}, {self.train.tokens:,} tokens, {self.held_out.tokens:,} held out)"


class SplitWriter:
    """Writes the files of one split as documents come in."""

    def __init__(self, folder: Path, name: str, dtype: str, *, shard_tokens: int, keep_text: bool):
        self._folder, self._name, self._dtype, self._shard_tokens = (
            folder,
            name,
            np.dtype(dtype),
            shard_tokens,
        )
        self.files: dict[str, HashingFile] = {}
        self.documents = self.tokens = self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._offsets = self._open("offsets.bin")
        self._offsets.write(np.zeros(1, "<u8"))
        self._origins = self._open("origins.bin")
        self._text = self._open("text.bin") if keep_text else None
        self._text_offsets = self._open("text_offsets.bin") if keep_text else None
        if self._text_offsets is not None:
            self._text_offsets.write(np.zeros(1, "<u8"))
        self._next_shard()

    def _open(self, suffix: str) -> "HashingFile":
        name = f"{self._name}.{suffix}"
        self.files[name] = HashingFile(self._folder / name)
        return self.files[name]

    def _next_shard(self) -> None:
        suffix = f"tokens.{len(self.shards):03d}.bin"
        self._tokens = self._open(suffix)
        self.shards.append({"file": f"{self._name}.{suffix}", "tokens": 0})

    def add(self, tokens: Sequence[int] | np.ndarray, text: bytes, origin: tuple[int, int]) -> None:
        """Append a document: its ids with begin and end, its text, the index of its input file and line."""
        if self.shards[-1]["tokens"] >= self._shard_tokens:
            self._next_shard()
        self._tokens.write(np.asarray(tokens, self._dtype))
        self.shards[-1]["tokens"] += len(tokens)
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += len(text)
        self._offsets.write(np.array([self.tokens], "<u8"))
        self._origins.write(np.array(origin, "<u4"))
        if self._text is not None and self._text_offsets is not None:
            self._text.write(np.frombuffer(text, "u1"))
            self._text_offsets.write(np.array([self.bytes], "<u8"))

    def close(self) -> dict[str, Any]:
        """Flush the files; the split's entry in meta.json."""
        for file in self.files.values():
            file.close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
        }


class HashingFile:
    """A file that knows its size and sha256 when closed."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, array: np.ndarray) -> None:
        """Append the array's bytes."""
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        """Close the file; `entry` is valid from now on."""
        self._file.close()

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in meta.json."""
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


_AGAIN = "remove the folder to have it prepared again"


def seal(meta: dict[str, Any]) -> bytes:
    """The bytes of meta.json, with the checksum of its own content in it."""
    return json.dumps({**meta, "checksum": _checksum(meta)}, indent=1, ensure_ascii=False).encode()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(meta: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / META
    if not file.is_file():
        raise UserError(
            f"{folder} is no prepared folder: it has no {META}; `maxstack data prepare` makes one"
        )
    try:
        meta = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; {_AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a prepared folder: its format is not {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise UserError(
            f"{file} has format version {meta.get('version')}, this program reads {VERSION}; {_AGAIN}"
        )
    if meta.get("checksum") != _checksum(meta):
        raise UserError(f"{file} is damaged: its checksum does not match; {_AGAIN}")
    return meta


def _check_sizes(folder: Path, meta: dict[str, Any]) -> None:
    for name, expected in meta["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {_AGAIN}")
        if file.stat().st_size != expected["bytes"]:
            found = file.stat().st_size
            raise UserError(f"{file} has {found} bytes, meta.json says {expected['bytes']}; {_AGAIN}")


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.asarray(
        np.memmap(path, dtype, mode="r")
    )  # as a plain array: indexing a memmap object is slower
