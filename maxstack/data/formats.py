"""Files to documents: text, JSONL and Parquet, plain or compressed.

Every document knows the file and line (Parquet: row) it came from, and every complaint names them.
"""

import bz2
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from maxstack.config import UserError
from maxstack.data.config import SourceConfig
from maxstack.data.tokenizer import well_formed

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
_CHUNK = 2**20
_MEND = "mend it, or set invalid=skip"


class Document(NamedTuple):
    """One document and where it came from."""

    text: str
    file: str
    line: int

    @property
    def origin(self) -> str:
        """ "file:line"."""
        return f"{self.file}:{self.line}"


@dataclass
class ReadCounts:
    """What reading left out or changed."""

    skipped: int = 0
    """Documents left out because they could not be read, with `invalid="skip"`."""
    replaced: int = 0
    """Documents in which bad bytes became U+FFFD, with `invalid="replace"`."""
    empty: int = 0
    """Documents without any character but white space."""


def find_files(path: str) -> list[Path]:
    """The files of a path setting, in a stable order: a file, a folder (all known kinds below it), or a glob."""
    if any(char in path for char in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(Path(path).expanduser()), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise UserError(f"no file matches {path!r}; a relative path starts from {Path.cwd()}")
        return files
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(
            f"{path!r} is neither a file nor a folder; a relative path starts from {Path.cwd()}, a fetched corpus is "
            "written corpus:NAME"
        )
    files = sorted(file for file in place.rglob("*") if file.is_file() and _kind(file) is not None)
    if not files:
        known = " ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES))
        raise UserError(f"folder {path!r} holds no file of a known kind ({known}, also .gz .xz .bz2 .zst)")
    return files


def read_documents(source: SourceConfig, files: list[Path], counts: ReadCounts) -> Iterator[Document]:
    """The documents of the files, cut to `split_documents_bytes`; blank ones are left out and counted.

    Raises UserError, naming file and line, for what `source.invalid` does not allow.
    """
    for file in files:
        kind = (_kind(file) or "text") if source.format == "auto" else source.format
        try:
            for document in _READERS[kind](source, file, counts):
                if not document.text.strip():
                    counts.empty += 1
                    continue
                yield from split_document(document, source.split_documents_bytes)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the operating system; the decompressors set no number
            raise UserError(f"{file}: damaged or cut off compressed file: {error}") from error


def split_document(document: Document, limit: int) -> Iterator[Document]:
    """Parts of at most about `limit` bytes, cut after a blank line, else a line, else a space, else anywhere."""
    text, line = document.text, document.line
    if not limit or len(text.encode()) <= limit:
        yield document
        return
    parts = -(-len(text.encode()) // limit)
    size = -(-len(text) // parts)  # parts of equal length, so that no scrap is left at the end
    start = 0
    while start < len(text):
        stop = min(start + size, len(text))
        if stop < len(text):
            low = start + size // 2
            cuts = (
                text.rfind(mark, low, stop) + len(mark)
                for mark in ("\n\n", "\n", " ")
                if mark in text[low:stop]
            )
            stop = next(cuts, stop)
        part = text[start:stop]
        if part.strip():
            yield Document(part, document.file, line)
        line += part.count("\n")
        start = stop


def _read_text(source: SourceConfig, file: Path, counts: ReadCounts) -> Iterator[Document]:
    encoding = source.encoding or "utf-8"
    separator = source.separator.encode(encoding)
    line = 1
    with _open(file) as stream:
        raws = _split_stream(stream, separator) if separator else iter([stream.read()])
        for raw in raws:
            text = _decode(raw, encoding, source, f"{file}", line, counts)
            if text is not None:
                yield Document(text.replace("\r\n", "\n"), str(file), line)
            line += raw.count(b"\n") + source.separator.count("\n")


def _split_stream(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    buffer, searched = bytearray(), 0
    while chunk := stream.read(_CHUNK):
        if chunk.endswith(b"\r"):
            chunk += stream.read(1)
        buffer += chunk.replace(b"\r\n", b"\n")  # so that a separator of line ends matches here too
        start = 0
        while (found := buffer.find(separator, max(start, searched))) >= 0:
            yield bytes(buffer[start:found])
            start = found + len(separator)
        del buffer[:start]
        searched = max(0, len(buffer) - len(separator) + 1)
    yield bytes(buffer)


def _read_jsonl(source: SourceConfig, file: Path, counts: ReadCounts) -> Iterator[Document]:
    encoding = source.encoding or "utf-8"
    with _open(file) as stream:
        for number, raw in enumerate(stream, 1):
            line = _decode(raw, encoding, source, str(file), number, counts)
            if line is None or not line.strip():
                continue
            text = _json_text(line, source, f"{file}:{number}", counts)
            if text is not None:
                yield Document(text, str(file), number)


def _json_text(line: str, source: SourceConfig, where: str, counts: ReadCounts) -> str | None:
    keys = " or ".join(map(repr, source.text_keys))
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return _refuse(source, counts, f"{where}: not JSON: {error.msg} at character {error.colno}; {_MEND}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return _refuse(source, counts, f"{where}: JSON that cannot be read: {error}; {_MEND}")
    if not isinstance(row, dict):
        return _refuse(
            source, counts, f"{where}: a JSON {type(row).__name__}, expected an object with {keys}; {_MEND}"
        )
    found = next((row[key] for key in source.text_keys if key in row), None)
    if not isinstance(found, str):
        present = any(key in row for key in source.text_keys)
        kind = "null" if found is None else type(found).__name__
        had = f"it is {kind}" if present else f"its keys are {', '.join(map(repr, row)) or 'none'}"
        return _refuse(
            source, counts, f"{where}: no text under {keys}; {had}. Set text_keys, or invalid=skip"
        )
    return _surrogates(found, source, where, counts)


def _read_parquet(source: SourceConfig, file: Path, counts: ReadCounts) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            column = next((key for key in source.text_keys if key in names), None)
            if column is None:
                wanted = " or ".join(map(repr, source.text_keys))
                raise UserError(f"{file}: no column {wanted}; it has {', '.join(names)}. Set text_keys")
            for block in table.iter_batches(batch_size=1024, columns=[column]):
                for value in block.column(0).to_pylist():
                    row += 1
                    if isinstance(value, str):
                        yield Document(value, str(file), row)
                    else:
                        _refuse(
                            source,
                            counts,
                            f"{file}:{row}: no text in column {column!r}, but {type(value).__name__}; {_MEND}",
                        )
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a readable Parquet file, after row {row}: {error}") from error


_READERS: dict[str, Callable[[SourceConfig, Path, ReadCounts], Iterator[Document]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _decode(
    raw: bytes, encoding: str, source: SourceConfig, file: str, line: int, counts: ReadCounts
) -> str | None:
    """The text, or None when the policy is to leave it out."""
    try:
        text = raw.decode(encoding)
        return text.removeprefix("\ufeff") if line == 1 else text
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        if source.invalid == "replace":
            counts.replaced += 1
            return raw.decode(encoding, "replace")
        bad = raw[error.start : error.start + 1].hex()
        return _refuse(
            source,
            counts,
            f"{file}:{line}: byte 0x{bad} is not valid {encoding}; set encoding (latin-1?), or invalid=replace or skip",
        )


def _surrogates(text: str, source: SourceConfig, where: str, counts: ReadCounts) -> str | None:
    fixed = well_formed(text)
    if fixed is text:
        return text
    if source.invalid == "replace":
        counts.replaced += 1
        return fixed
    return _refuse(
        source, counts, f"{where}: half a surrogate pair, no valid character; set invalid=replace or skip"
    )


def _refuse(source: SourceConfig, counts: ReadCounts, message: str) -> None:
    if source.invalid != "skip":
        raise UserError(message)
    counts.skipped += 1


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    for suffix in (".gz", ".xz", ".bz2", ".zst"):
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    kinds = {"text": TEXT_SUFFIXES, "jsonl": JSONL_SUFFIXES, "parquet": PARQUET_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), None)


def _open(file: Path) -> Any:
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
        ".zst": _open_zst,
    }
    return openers.get(file.suffix.lower(), lambda path: path.open("rb"))(file)


def _open_zst(file: Path) -> IO[bytes]:
    import io

    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), _CHUNK)
