"""Documents to prepared folders, once: read, choose what is held out, train the tokenizer if asked to, tokenise.

Two passes over the text. The first (`scan`) hashes and measures the documents, which costs a few per cent of the second
and finds bad input before any work is done; from it the held-out documents are chosen. The second tokenises.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import batched
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from maxstack.config import RunError, UserError
from maxstack.data.atomic import build_once
from maxstack.data.config import DataConfig, SourceConfig, TokenizerConfig
from maxstack.data.fetch import cache_folder
from maxstack.data.formats import Document
from maxstack.data.scan import Input, Progress, Report, Scan, json_hash
from maxstack.data.store import FORMAT, META, SPLITS, TOKENIZER, VERSION, PreparedSource, SplitWriter, seal
from maxstack.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

type Frame = tuple[list[int], list[int]]
"""Ids put before and after each document."""

log = logging.getLogger(__name__)
SHARD_TOKENS = 2**28
GROUP_DOCUMENTS = 256  # encoded at once
GROUP_BYTES = 2**22


@dataclass(frozen=True)
class PreparedData:
    """All sources of a run, prepared with one tokenizer."""

    tokenizer: Tokenizer
    sources: dict[str, PreparedSource]

    @property
    def fingerprint(self) -> str:
        """Of the content of all sources; the same on every machine."""
        return json_hash({name: source.fingerprint for name, source in self.sources.items()})

    def verify(self) -> None:
        """Read every file again and compare checksums; UserError names one that differs."""
        for source in self.sources.values():
            source.verify()


def prepare(config: DataConfig, progress: Report | None = None) -> PreparedData:
    """Open the prepared folders of a run, making those that are not there yet.

    Safe in several processes at once (one works, the others wait) and against being killed at any moment.
    Raises UserError for bad input, RunError when a corpus cannot be fetched or the disk is full.
    """
    report = progress or _silent
    root = cache_folder(config.cache)
    ready = {
        s.name: PreparedSource(Path(path), s.name) for s in config.sources if (path := _prepared_path(s))
    }
    inputs = {s.name: Input(s, root, report) for s in config.sources if s.name not in ready}
    tokenizer = _tokenizer(config.tokenizer, inputs.values(), ready.values(), root, report)
    frame = _frame(config.tokenizer, tokenizer)
    for source in ready.values():
        _check_tokenizer(source, tokenizer, frame)
    for name, source_input in inputs.items():
        key = json_hash([source_input.key, tokenizer.fingerprint, frame])
        target = root / "prepared" / f"{name}-{key[:16]}"
        if build_once(target, _Builder(source_input, tokenizer, frame, config.prepare_workers, report)):
            log.info("prepared %s in %s", name, target)
        ready[name] = PreparedSource(target, name)
    return PreparedData(tokenizer, {source.name: ready[source.name] for source in config.sources})


def prepare_into(config: DataConfig, folder: Path, progress: Report | None = None) -> PreparedData:
    """Prepare each source into `folder/NAME`, to be carried elsewhere and used as `path="prepared:FOLDER/NAME"`.

    Folders that are there already are kept; UserError when they came from other files, settings or tokenizer.
    """
    report = progress or _silent
    root = cache_folder(config.cache)
    inputs = {s.name: Input(s, root, report) for s in config.sources}
    tokenizer = _tokenizer(config.tokenizer, inputs.values(), (), root, report)
    frame = _frame(config.tokenizer, tokenizer)
    sources = {}
    for name, source_input in inputs.items():
        target = folder / name
        build_once(target, _Builder(source_input, tokenizer, frame, config.prepare_workers, report))
        sources[name] = PreparedSource(target, name)
        _check_tokenizer(sources[name], tokenizer, frame)
        if sources[name].meta["key"] != source_input.key:
            raise UserError(
                f"{target} was prepared from other files or settings: remove it, or name another folder"
            )
    return PreparedData(tokenizer, sources)


class _Builder:
    """Writes one prepared folder."""

    def __init__(self, source: Input, tokenizer: Tokenizer, frame: Frame, workers: int, report: Report):
        self._input, self._tokenizer, self._frame = source, tokenizer, frame
        self._workers, self._report = workers, report

    def __call__(self, folder: Path) -> None:
        """Fill the folder."""
        scan = self._input.scan(self._report)
        dtype = "<u2" if self._tokenizer.vocab_size <= 2**16 else "<u4"
        writers = {
            split: SplitWriter(folder, split, dtype, shard_tokens=SHARD_TOKENS, keep_text=split == "held_out")
            for split in SPLITS
        }
        try:
            self._write(scan, writers)
        finally:
            splits = {name: writer.close() for name, writer in writers.items()}
        files = {name: file.entry for writer in writers.values() for name, file in writer.files.items()}
        self._tokenizer.save(folder / TOKENIZER)
        (folder / META).write_bytes(seal(self._meta(scan, dtype, splits, files)))

    def _write(self, scan: Scan, writers: dict[str, SplitWriter]) -> None:
        name = self._input.source.name
        numbers = {str(file): number for number, file in enumerate(self._input.files)}
        index = done = 0
        total = int(scan.bytes.sum())
        for documents, ids in self._encoded():
            for document, tokens in zip(documents, ids, strict=True):
                raw = document.text.encode("utf-8")
                if index >= len(scan.hashes) or len(raw) != scan.bytes[index]:
                    raise UserError(f"{document.origin} changed while it was being prepared; start again")
                split = "held_out" if scan.held_out[index] else "train"
                writers[split].add(tokens, raw, (numbers[document.file], document.line))
                index += 1
                done += len(raw)
            self._report(Progress("tokenise", name, done, total))
        self._input.check_unchanged()

    def _encoded(self) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
        groups = _grouped(self._input.documents())
        if not self._workers:
            for group in groups:
                yield group, encode_documents(self._tokenizer, self._frame, [d.text for d in group])
            return
        with ProcessPoolExecutor(
            self._workers,
            mp_context=get_context("spawn"),  # a fork would copy a process that has threads
            initializer=_Worker.start,
            initargs=(self._tokenizer, self._frame),
        ) as pool:
            # Bounded: a few groups a worker are in flight, however large the corpus.
            for some in batched(groups, 4 * self._workers):
                texts = [[document.text for document in group] for group in some]
                yield from zip(some, pool.map(_Worker.encode, texts), strict=True)

    def _meta(self, scan: Scan, dtype: str, splits: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
        content = {name: entry["sha256"] for name, entry in files.items() if ".origins." not in name}
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self._input.source.name,
            "key": self._input.key,
            "fingerprint": json_hash([VERSION, dtype, self._tokenizer.fingerprint, content]),
            "dtype": dtype,
            "tokenizer": {
                "fingerprint": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "bos_id": self._tokenizer.bos_id,
                "eos_id": self._tokenizer.eos_id,
                "frame": [*self._frame],
            },
            "splits": splits,
            "read": dataclasses.asdict(scan.counts),
            "settings": self._input.settings,
            "inputs": [str(file) for file in self._input.files],
            "files": files,
        }


class _Worker:
    """What a tokenising process keeps between groups."""

    tokenizer: Tokenizer | None = None
    frame: Frame = ([], [])

    @classmethod
    def start(cls, tokenizer: Tokenizer, frame: Frame) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process: the processes are the parallelism
        cls.tokenizer, cls.frame = tokenizer, frame

    @classmethod
    def encode(cls, texts: list[str]) -> list[np.ndarray]:
        if cls.tokenizer is None:
            raise RunError("a tokenising process was started without its tokenizer")
        return encode_documents(cls.tokenizer, cls.frame, texts)


def encode_documents(tokenizer: Tokenizer, frame: Frame, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text between begin and end ids, uint32."""
    begin, end = frame
    return [np.array([*begin, *ids, *end], np.uint32) for ids in tokenizer.encode_batch(texts)]


def _frame(config: TokenizerConfig, tokenizer: Tokenizer) -> Frame:
    """The ids put before and after each document."""
    own = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    sides: list[list[int]] = []
    for name in (config.begin, config.end):
        found = own[name] if name in own else tokenizer.token_id(name)
        if found is None and name not in (*own, "none"):
            raise UserError(
                f"data.tokenizer: {name!r} is no vocabulary entry; give bos, eos, none or one that is"
            )
        sides.append([] if found is None else [found])
    if not any(sides):
        log.warning(
            "documents carry no begin and no end token: a model trained on them does not learn to stop"
        )
    return sides[0], sides[1]


def _check_tokenizer(source: PreparedSource, tokenizer: Tokenizer, frame: Frame) -> None:
    where = f"source {source.name!r} at {source.folder} was prepared with"
    if source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{where} {source.tokenizer}, this run uses {tokenizer}; set data.tokenizer.path to "
            f"{source.folder / TOKENIZER}, or prepare the source again"
        )
    if source.meta["tokenizer"]["frame"] != [*frame]:
        raise UserError(
            f"{where} begin and end ids {source.meta['tokenizer']['frame']}, this run uses {[*frame]}; "
            "set data.tokenizer.begin and end as they were, or prepare the source again"
        )


def _tokenizer(
    wanted: TokenizerConfig,
    inputs: Iterable[Input],
    ready: Iterable[PreparedSource],
    root: Path,
    report: Report,
) -> Tokenizer:
    """The run's tokenizer: by path, that of folders prepared before, or trained (once) on the training text."""
    if wanted.path:
        return load_tokenizer(wanted.path)
    for source in ready:
        return source.tokenizer
    key = json_hash([VERSION, wanted.vocab_size, wanted.sample_bytes, [i.key for i in inputs]])
    target = root / "tokenizers" / f"bpe-{wanted.vocab_size}-{key[:16]}"
    build_once(target, _tokenizer_builder(wanted, inputs, report))
    return load_tokenizer(target)


def _tokenizer_builder(
    wanted: TokenizerConfig, inputs: Iterable[Input], report: Report
) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        scans = [source.scan(report) for source in inputs]
        total = sum(int(scan.bytes[~scan.held_out].sum()) for scan in scans)
        sample = min(total, wanted.sample_bytes)
        report(Progress("train tokenizer", "", 0, sample))
        share = wanted.sample_bytes / total
        texts = (text for source in inputs for text in source.train_texts(share, report))
        train_bpe(texts, wanted.vocab_size).save(folder)
        report(Progress("train tokenizer", "", sample, sample))

    return build


def _grouped(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if len(group) >= GROUP_DOCUMENTS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _prepared_path(source: SourceConfig) -> str | None:
    paths = [path for path in source.paths if path.startswith("prepared:")]
    if paths and len(source.paths) > 1:
        raise UserError(f"source {source.name!r}: a prepared folder stands alone, got {source.paths}")
    return paths[0].removeprefix("prepared:") if paths else None


def _silent(progress: Progress) -> None:
    """Report to nobody."""
