"""The first pass over a source: what its files hold, and which documents are held out."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.data.config import SourceConfig
from maxstack.data.corpora import CORPORA
from maxstack.data.fetch import fetch
from maxstack.data.formats import Document, ReadCounts, find_files, read_documents
from maxstack.data.store import VERSION


class Progress(NamedTuple):
    """How far preparing has come."""

    stage: str
    """fetch, read, train tokenizer, or tokenise."""
    source: str
    done: int
    """Bytes of text so far."""
    total: int
    """Bytes of text, 0 while not known."""

    def __str__(self) -> str:
        of = f"{self.done / 1e6:.1f} of {self.total / 1e6:.1f}" if self.total else f"{self.done / 1e6:.1f}"
        return f"{self.stage} {self.source}: {of} MB"


type Report = Callable[[Progress], None]


class Input:
    """A source's files and the key under which their prepared form is found again."""

    def __init__(self, source: SourceConfig, cache: Path, report: Report):
        self.files: list[Path] = []
        for path in source.paths:
            if path.startswith("corpus:"):
                name = path.removeprefix("corpus:")
                report(Progress("fetch", source.name, 0, 0))
                self.files += find_files(str(fetch(name, cache)))
                source = dataclasses.replace(source, encoding=source.encoding or CORPORA[name].encoding)
            else:
                self.files += find_files(path)
        self.source = source
        self._stats = [_stat(file) for file in self.files]
        # A name or a weight does not change what is prepared; the path is in the list of files.
        chosen = dataclasses.asdict(source)
        self.settings: dict[str, Any] = {
            k: v for k, v in chosen.items() if k not in ("name", "path", "weight")
        }
        self.key = json_hash([VERSION, self.settings, self._stats])
        self._scan: Scan | None = None

    def documents(self, counts: ReadCounts | None = None) -> Iterator[Document]:
        """The documents of the source."""
        return read_documents(self.source, self.files, counts or ReadCounts())

    def check_unchanged(self) -> None:
        """Raise UserError if a file is not what it was when the key was made."""
        for file, stat in zip(self.files, self._stats, strict=True):
            if _stat(file) != stat:
                raise UserError(f"{file} changed while it was being prepared; start again")

    def scan(self, report: Report) -> "Scan":
        """What the first pass finds; it is made once."""
        if self._scan is None:
            self._scan = Scan(self, report)
        return self._scan

    def train_texts(self, share: float, report: Report) -> Iterator[str]:
        """Texts of training documents, chosen by their hashes, about this share of them."""
        scan = self.scan(report)
        # Multiplying makes the choice independent of the held-out one, which takes the smallest hashes.
        spread = scan.hashes * np.uint64(0x9E3779B97F4A7C15)
        chosen = ~scan.held_out & ((spread >> np.uint64(11)) < share * 2**53)
        if not chosen.any():
            chosen[np.argmin(scan.held_out)] = True
        for index, document in enumerate(self.documents()):
            if chosen[index]:
                yield document.text


class Scan:
    """Hash and size of every document, and which are held out."""

    def __init__(self, source: Input, report: Report):
        hashes, sizes, self.counts = [], [], ReadCounts()
        done, name = 0, source.source.name
        for number, document in enumerate(source.documents(self.counts)):
            raw = document.text.encode("utf-8")
            hashes.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
            sizes.append(len(raw))
            done += len(raw)
            if number % 256 == 0:
                report(Progress("read", name, done, 0))
        if not hashes:
            left_out = f"{self.counts.empty} blank and {self.counts.skipped} unreadable documents left out"
            raise UserError(
                f"source {name!r} is empty: {len(source.files)} files at {source.source.path}, {left_out}; give it text"
            )
        report(Progress("read", name, done, done))
        self.hashes = np.array(hashes, np.uint64)
        self.bytes = np.array(sizes, np.int64)
        self.held_out = choose_held_out(self.hashes, self.bytes, source.source)


def choose_held_out(hashes: np.ndarray, sizes: np.ndarray, source: SourceConfig) -> np.ndarray:
    """True for held-out documents: those with the smallest hashes, as near as can be to the share of bytes asked for.

    The hash is of the text: equal documents fall on the same side, and nearly all keep their side when others come.
    """
    wanted = min(source.held_out_fraction * float(sizes.sum()), source.held_out_max_bytes)
    if wanted == 0:
        return np.zeros(len(hashes), bool)
    unique, inverse = np.unique(hashes, return_inverse=True)
    if len(unique) < 2:
        raise UserError(
            f"source {source.name!r} has one document and held_out_fraction {source.held_out_fraction}: "
            "set split_documents_bytes below its size, or held_out_fraction to 0"
        )
    covered = np.cumsum(np.bincount(inverse, weights=sizes))
    count = int(np.argmin(np.abs(covered - wanted))) + 1
    return inverse < min(count, len(unique) - 1)


def _stat(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file.absolute()), found.st_size, found.st_mtime_ns


def json_hash(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
