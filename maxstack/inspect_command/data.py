"""Prepared data as plain values, and packed rows decoded: which document each piece is of, and what the loss counts."""

import dataclasses
import itertools
import logging
import unicodedata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maxstack.config import UserError
from maxstack.data import Batch, DataConfig, SourceConfig, Tokenizer, load_tokenizer
from maxstack.data.batches import Batches
from maxstack.data.fetch import cache_folder
from maxstack.data.packing import Piece, empty_batch, fill_row
from maxstack.data.prepare import PreparedData
from maxstack.data.store import META, PreparedSource, Split
from maxstack.inspect_command.facts import Facts

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a row that are treated alike."""

    document: int
    """Which document of the row, from 1; 0 is padding."""
    counted: bool
    """Whether their labels count towards the loss."""
    special: bool
    """Whether they are special tokens, shown by name."""
    tokens: int
    text: str


def source_facts(source: PreparedSource) -> Facts:
    """Counts, tokenizer and settings of a prepared folder; no token is read."""
    meta = source.meta
    splits = {}
    for split in (source.train, source.held_out):
        splits[split.name] = {
            "documents": split.documents,
            "tokens": split.tokens,
            "text_bytes": split.bytes,
            "bytes_per_token": split.bytes / split.tokens if split.tokens else None,
            "shards": meta["splits"][split.name]["shards"],
        }
    return {
        "name": source.name, "folder": str(source.folder), "version": meta["version"],
        "fingerprint": source.fingerprint, "dtype": meta["dtype"], "tokenizer": meta["tokenizer"],
        "splits": splits, "inputs": meta["inputs"], "settings": meta["settings"],
        "bytes": sum(entry["bytes"] for entry in meta["files"].values()),
    }  # fmt: skip


def shard_facts(path: Path) -> Facts:
    """The documents that lie in one file of tokens. Raises UserError for a file that holds no tokens."""
    source = PreparedSource(path.parent)
    split, first, last = _documents_of(source, path)
    return {
        "file": path.name, "split": split.name, "documents": last - first, "first_document": first,
        "tokens": int(split.offsets[last] - split.offsets[first]),
        "origins": [split.origin(index) for index in (first, last - 1)] if last > first else [],
    }  # fmt: skip


def _documents_of(source: PreparedSource, path: Path) -> tuple[Split, int, int]:
    """The split that a file of tokens belongs to, and its documents [first, last)."""
    for split in (source.train, source.held_out):
        start = 0
        for shard in source.meta["splits"][split.name]["shards"]:
            stop = start + shard["tokens"]
            if shard["file"] == path.name:
                first, last = np.searchsorted(split.offsets, [start, stop])
                return split, int(first), int(last)
            start = stop
    raise UserError(f"{path} holds no tokens; inspect its folder, {path.parent}, or a file *.tokens.NNN.bin")


def shard_rows(path: Path, seq_len: int, count: int) -> list[list[Span]]:
    """The file's first documents end to end, in the order they lie, as rows of `seq_len` tokens."""
    source = PreparedSource(path.parent)
    split, first, last = _documents_of(source, path)
    rows: list[list[Piece]] = [[]]
    room = seq_len
    for index in range(first, last):
        start, end = int(split.offsets[index]), int(split.offsets[index + 1])
        while start < end and len(rows) <= count:
            stop = min(end, start + room)
            rows[-1].append(Piece(start, stop, end))
            room, start = room - (stop - start), stop
            if room == 0:
                rows.append([])
                room = seq_len
        if len(rows) > count:
            break
    rows = [row for row in rows if row][:count]
    batch = empty_batch(len(rows), seq_len)
    for number, pieces in enumerate(rows):
        fill_row(batch, number, split, pieces)
    return decoded(batch, source.tokenizer)


def folder_rows(
    folder: Path, seq_len: int, packing: Literal["concat", "best_fit"], step: int, count: int
) -> list[list[Span]]:
    """Rows of a prepared folder as training would pack and order them, seed 0."""
    source = PreparedSource(folder)
    config = DataConfig(
        sources=(SourceConfig(name=source.name, path=f"prepared:{folder}"),), seq_len=seq_len, packing=packing
    )
    return packed_rows(config, PreparedData(source.tokenizer, {source.name: source}), count, step)


def packed_rows(config: DataConfig, prepared: PreparedData, batch_rows: int, step: int) -> list[list[Span]]:
    """All rows of a step, decoded."""
    return decoded(Batches(config, prepared, batch_rows=batch_rows).batch(step), prepared.tokenizer)


def prepared_of(config: DataConfig, fingerprints: dict[str, str], tokenizer: Path) -> PreparedData | None:
    """The prepared folders of a run, where they are still there: the ones with these fingerprints. Prepares nothing."""
    sources = {}
    for source in config.sources:
        named = [
            Path(path.removeprefix("prepared:")) for path in source.paths if path.startswith("prepared:")
        ]
        candidates = named or (cache_folder(config.cache) / "prepared").glob(f"{source.name}-*")
        for folder in candidates:
            if (folder / META).is_file():
                found = PreparedSource(folder, source.name)
                if found.fingerprint == fingerprints.get(source.name):
                    sources[source.name] = found
    if len(sources) < len(config.sources) or not tokenizer.is_dir():
        return None
    own = next(iter(sources.values())).tokenizer  # the ids belong to this one
    if load_tokenizer(tokenizer).fingerprint != own.fingerprint:
        log.warning("%s is not the tokenizer of the data that the run was trained on", tokenizer)
    return PreparedData(own, sources)


def decoded(batch: Batch, tokenizer: Tokenizer) -> list[list[Span]]:
    """Each row as spans of tokens of one document that the loss treats alike."""
    special = {int(i): not tokenizer.decode([int(i)]) for i in np.unique(batch.tokens)}
    rows = []
    for tokens, segments, weights in zip(batch.tokens, batch.segment_ids, batch.weights, strict=True):
        keys = [
            (int(segment), bool(weight > 0), bool(special[int(token)] and segment > 0))
            for token, segment, weight in zip(tokens, segments, weights, strict=True)
        ]
        spans = []
        for (segment, counted, named), group in itertools.groupby(range(len(tokens)), keys.__getitem__):
            ids = [int(tokens[index]) for index in group]
            spans.append(Span(segment, counted, named, len(ids), _text(tokenizer, ids, segment, named)))
        rows.append(spans)
    return rows


def _text(tokenizer: Tokenizer, ids: list[int], segment: int, named: bool) -> str:
    if segment == 0:
        return ""
    text = "".join(tokenizer.token(i) or f"<{i}>" for i in ids) if named else tokenizer.decode(ids)
    return visible(text)


def visible(text: str) -> str:
    """Text that a terminal shows and does not obey: line ends and tabs as signs, control characters as pictures."""
    signs = {"\n": "↵\n", "\t": "→\t"}
    return "".join(signs.get(char) or _picture(char) for char in text)


def _picture(char: str) -> str:
    if ord(char) < 32:
        return chr(0x2400 + ord(char))
    return "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char


def rows_facts(rows: list[list[Span]]) -> list[list[dict[str, Any]]]:
    """The rows as plain values."""
    return [[dataclasses.asdict(span) for span in row] for row in rows]
