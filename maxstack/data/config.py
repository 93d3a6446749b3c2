"""What the user sets about data."""

from dataclasses import dataclass
from typing import Literal

INVALID_POLICIES = ("error", "replace", "skip")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer: an existing one, or one trained on the training part of the sources."""

    path: str = ""
    """Folder with tokenizer.json, a tokenizer.json file, "hf:owner/name" (a repository on the Hugging Face Hub; a
    cached copy works offline), or "bytes" (256 bytes and one special). Empty: train one."""
    vocab_size: int = 4096
    """Tokens of the byte BPE trained when `path` is empty, the special one included; at least 257."""
    sample_bytes: int = 64 * 2**20
    """Text the byte BPE is trained on, in bytes over all sources, each in proportion to its size."""
    begin: str = "bos"
    """Token put before each document: "bos" (the tokenizer's own, if it has one), "none", or a vocabulary entry."""
    end: str = "eos"
    """Token put after each document: "eos" (the tokenizer's own, if it has one), "none", or a vocabulary entry."""

    def __post_init__(self) -> None:
        if not self.path and self.vocab_size < 257:
            raise ValueError(
                f"tokenizer.vocab_size {self.vocab_size} must be at least 257: 256 bytes and one special"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"tokenizer.sample_bytes {self.sample_bytes} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus: where it lies, how documents are read from it, what is held out, its weight in the mixture."""

    name: str
    """Short name, unique in the run; metrics and mixture stages use it."""
    path: str | tuple[str, ...]
    """File, folder, glob, "corpus:NAME" (a corpus fetched as a package) or "prepared:FOLDER"; or several of them."""
    weight: float = 1.0
    """Share of the training rows, relative to the other sources."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """How files are read; auto goes by the file name."""
    text_keys: tuple[str, ...] = ("text", "content")
    """JSONL keys or Parquet columns that hold the text; the first one present is used."""
    encoding: str = ""
    """Encoding of text files, such as latin-1. Empty: utf-8, or what a fetched corpus is known to use."""
    invalid: Literal["error", "replace", "skip"] = "error"
    """A document that cannot be read (invalid bytes, no text): stop, put U+FFFD for bad bytes, or leave it out."""
    separator: str = ""
    """Text files hold several documents with this string between them. Empty: one document a file."""
    split_documents_bytes: int = 2**20
    """Longer documents are cut at paragraph or line ends into parts of at most about this size. 0: never."""
    held_out_fraction: float = 0.05
    """Share of the bytes kept out of training for evaluation, by whole documents (or parts). 0: none."""
    held_out_max_bytes: int = 16 * 2**20
    """Upper bound on the bytes held out."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"source name {self.name!r} must be a plain word: it names a folder")
        if not self.paths or not all(self.paths):
            raise ValueError(f"source {self.name!r}: an empty path; name a file, folder, glob or corpus:NAME")
        if self.weight < 0:
            raise ValueError(f"source {self.name!r}: weight {self.weight} must not be negative")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(
                f"source {self.name!r}: held_out_fraction {self.held_out_fraction} must be in [0, 1)"
            )
        if self.invalid not in INVALID_POLICIES:
            raise ValueError(
                f"source {self.name!r}: invalid {self.invalid!r} must be one of {INVALID_POLICIES}"
            )
        if self.encoding:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise ValueError(f"source {self.name!r}: {error}") from error
        if self.split_documents_bytes < 0:
            raise ValueError(f"source {self.name!r}: split_documents_bytes must not be negative")

    @property
    def paths(self) -> tuple[str, ...]:
        """The path setting as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """Weights of the sources from a step on, until the next stage."""

    step: int
    """First step with these weights."""
    weights: dict[str, float]
    """Weight by source name; a source left out gets 0."""
    ramp_steps: int = 0
    """Steps over which the weights move linearly from those before to these; 0 changes them at once."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data: sources, tokenizer, packing, order, reading."""

    sources: tuple[SourceConfig, ...]
    """The corpora."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer, one for all sources."""
    stages: tuple[MixtureStage, ...] = ()
    """Weights that change over time; before the first stage the sources' own weights hold."""
    seq_len: int = 512
    """Tokens a row."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents end to end, cut into rows. best_fit: documents stay whole where they fit, rows are padded."""
    seed: int = 0
    """Seed of the order of documents and rows; the held-out choice does not depend on it."""
    read_threads: int = 1
    """Threads that read ahead in a training process. One is fastest where files lie in memory or on a fast disk."""
    read_workers: int = 0
    """Processes that read ahead, each with `read_threads` threads; 0: read in the training process."""
    prefetch: int = 8
    """Steps read ahead, in each worker."""
    prepare_workers: int = 0
    """Processes that tokenise while preparing; 0: the tokenizer's own threads."""
    cache: str = ""
    """Folder for fetched and prepared data. Empty: $MAXSTACK_CACHE, or ~/.cache/maxstack."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("data needs at least one source")
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len {self.seq_len} must be at least 2")
        if self.packing not in ("concat", "best_fit"):
            raise ValueError(f"packing {self.packing!r} must be 'concat' or 'best_fit'")
        for field, least in (
            ("read_threads", 0),
            ("read_workers", 0),
            ("prefetch", 1),
            ("prepare_workers", 0),
        ):
            if getattr(self, field) < least:
                raise ValueError(f"{field} {getattr(self, field)} must be at least {least}")


def shakespeare(*, vocab_size: int = 4096, seq_len: int = 512) -> DataConfig:
    """The quickstart corpus: 42 plays and poems, 5.0 MB, in parts of about 16 kB, a twentieth held out."""
    source = SourceConfig(name="shakespeare", path="corpus:shakespeare", split_documents_bytes=16 * 2**10)
    return DataConfig(
        sources=(source,),
        tokenizer=TokenizerConfig(vocab_size=vocab_size, sample_bytes=8 * 2**20),
        seq_len=seq_len,
    )
