import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maxstack.config import RunError, UserError
from maxstack.data import store
from maxstack.data.config import DataConfig, SourceConfig, TokenizerConfig
from maxstack.data.formats import ReadCounts, find_files, read_documents
from maxstack.data.prepare import prepare, prepare_into
from maxstack.data.scan import choose_held_out
from maxstack.data.store import PreparedSource

ROOT = Path(__file__).resolve().parents[2]


def alone(config: DataConfig, tmp_path: Path, **changes) -> DataConfig:
    """The first source alone, with a cache of its own and a byte tokenizer."""
    source = dataclasses.replace(config.sources[0], **changes)
    return dataclasses.replace(
        config, sources=(source,), tokenizer=TokenizerConfig(path="bytes"), cache=str(tmp_path / "cache")
    )


def folders(config: DataConfig) -> list[Path]:
    return [p for p in (Path(config.cache) / "prepared").iterdir() if not p.name.startswith(".")]


def partials(config: DataConfig) -> list[Path]:
    return list(Path(config.cache).rglob("*.partial"))


def test_documents_come_back_as_they_were(config, prepared):
    for source in config.sources:
        found = prepared.sources[source.name]
        texts = {}
        for split in (found.train, found.held_out):
            assert split.documents == len(split.offsets) - 1
            for index in range(split.documents):
                tokens = split.document(index)
                assert tokens[0] == tokens[-1] == prepared.tokenizer.eos_id
                text = prepared.tokenizer.decode(tokens)
                texts[split.origin(index)] = text
                if split is found.held_out:
                    assert split.text(index) == text
        wanted = {d.origin: d.text for d in read_documents(source, find_files(source.path), ReadCounts())}
        assert texts == wanted


def test_meta_counts_documents_tokens_and_bytes(config, prepared):
    source = prepared.sources["plays"]
    total = sum(file.stat().st_size for file in Path(config.sources[0].path).iterdir())
    assert source.train.bytes + source.held_out.bytes == total
    assert source.train.documents + source.held_out.documents == 60
    assert source.train.tokens == source.train.offsets[-1]
    assert len(source.held_out_text()) == source.held_out.bytes
    assert source.meta["tokenizer"]["fingerprint"] == prepared.tokenizer.fingerprint


def test_held_out_is_near_its_share_and_equal_texts_stay_together():
    rng = np.random.default_rng(0)
    hashes, sizes = rng.integers(0, 2**64, 5000, np.uint64), rng.integers(1, 4000, 5000)
    hashes[1::2] = hashes[::2]  # every document twice
    sizes[1::2] = sizes[::2]
    source = SourceConfig(name="x", path="x", held_out_fraction=0.05)
    chosen = choose_held_out(hashes, sizes, source)
    # Within one pair of documents, of at most 4000 bytes each.
    assert abs(sizes[chosen].sum() - 0.05 * sizes.sum()) <= 2 * 4000
    assert (chosen[1::2] == chosen[::2]).all()
    few = choose_held_out(hashes, sizes, dataclasses.replace(source, held_out_max_bytes=20_000))
    assert few.any()
    assert not (few & ~chosen).any()
    assert sizes[few].sum() <= 20_000 + 8000


def test_a_document_keeps_its_side_when_others_come():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 4000, np.uint64)
    source = SourceConfig(name="x", path="x", held_out_fraction=0.1)
    before = choose_held_out(hashes[:2000], np.full(2000, 100), source)
    after = choose_held_out(hashes, np.full(4000, 100), source)[:2000]
    # The border of 10 % moves by its sampling error, 0.7 % of the documents at one sigma.
    assert (before != after).mean() < 0.03


def test_one_document_can_be_held_out_in_parts_only(source, tmp_path):
    made = source("line of words\n" * 500)
    config = DataConfig(sources=(made,), tokenizer=TokenizerConfig(path="bytes"), cache=str(tmp_path / "c"))
    with pytest.raises(UserError, match="split_documents_bytes"):
        prepare(config)
    parts = dataclasses.replace(made, split_documents_bytes=500)
    found = prepare(dataclasses.replace(config, sources=(parts,))).sources["made"]
    assert found.held_out.documents >= 1
    assert found.train.documents >= 12
    nothing = dataclasses.replace(made, held_out_fraction=0.0)
    assert prepare(dataclasses.replace(config, sources=(nothing,))).sources["made"].held_out.documents == 0


def test_found_again_until_a_file_a_setting_or_the_tokenizer_changes(config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(config.sources[0].path, copy)
    mine = alone(config, tmp_path, path=str(copy))
    first = prepare(mine)
    stages = []
    again = prepare(mine, lambda progress: stages.append(progress.stage))
    assert stages == []
    assert again.fingerprint == first.fingerprint
    # A weight or another name is no reason to tokenise again.
    prepare(alone(config, tmp_path, path=str(copy), weight=9.0))
    assert len(folders(mine)) == 1
    (copy / "00.txt").write_text("something else entirely")
    changed = prepare(mine)
    assert changed.fingerprint != first.fingerprint
    assert len(folders(mine)) == 2
    prepare(alone(config, tmp_path, path=str(copy), held_out_fraction=0.3))
    assert len(folders(mine)) == 3
    prepare(dataclasses.replace(mine, tokenizer=TokenizerConfig(vocab_size=270)))
    assert len(folders(mine)) == 4


def test_content_fingerprint_does_not_depend_on_where_and_when(config, tmp_path):
    found = set()
    for name in ("one", "two"):
        copy = tmp_path / name / "text"
        shutil.copytree(config.sources[0].path, copy)
        found.add(prepare(alone(config, tmp_path / name, path=str(copy))).fingerprint)
    assert len(found) == 1


def test_worker_processes_give_the_same_folder(config, tmp_path):
    one = prepare(alone(config, tmp_path / "a"))
    two = prepare(dataclasses.replace(alone(config, tmp_path / "b"), prepare_workers=2))
    assert one.fingerprint == two.fingerprint


def test_shards_hold_whole_documents(config, tmp_path, monkeypatch):
    whole = prepare(alone(config, tmp_path / "a")).sources["plays"]
    monkeypatch.setattr("maxstack.data.prepare.SHARD_TOKENS", 3000)
    cut = prepare(alone(config, tmp_path / "b")).sources["plays"]
    assert len(cut.meta["splits"]["train"]["shards"]) > 5
    for index in range(whole.train.documents):
        assert np.array_equal(cut.train.document(index), whole.train.document(index))
    cut.verify()


def test_large_vocabularies_take_four_bytes(config, tmp_path, monkeypatch, prepared):
    monkeypatch.setattr(type(prepared.tokenizer), "vocab_size", 2**16 + 1, raising=False)
    monkeypatch.setattr(type(prepared.tokenizer), "__setattr__", _skip_vocab_size)
    wide = prepare(alone(config, tmp_path))
    assert wide.sources["plays"].meta["dtype"] == "<u4"
    assert wide.tokenizer.decode(wide.sources["plays"].train.document(0)).strip()


def _skip_vocab_size(self, name, value):
    if name != "vocab_size":
        object.__setattr__(self, name, value)


def test_begin_and_end_tokens_can_be_chosen(config, tmp_path):
    mine = alone(config, tmp_path)
    bare = dataclasses.replace(mine, tokenizer=TokenizerConfig(path="bytes", begin="none", end="A"))
    found = prepare(bare)
    tokens = found.sources["plays"].train.document(0)
    assert tokens[-1] == ord("A")
    assert tokens[0] < 256
    with pytest.raises(UserError, match="'<x>' is no vocabulary entry"):
        prepare(dataclasses.replace(mine, tokenizer=TokenizerConfig(path="bytes", begin="<x>")))
    folder = dataclasses.replace(mine.sources[0], path=f"prepared:{found.sources['plays'].folder}")
    with pytest.raises(UserError, match="begin and end"):
        prepare(dataclasses.replace(mine, sources=(folder,)))


def test_a_prepared_folder_can_be_carried_away_and_used(config, prepared, tmp_path):
    out = tmp_path / "out"
    made = prepare_into(config, out)
    assert made.fingerprint == prepared.fingerprint
    moved = tmp_path / "moved"
    out.rename(moved)
    sources = tuple(dataclasses.replace(s, path=f"prepared:{moved / s.name}") for s in config.sources)
    elsewhere = dataclasses.replace(config, sources=sources, cache=str(tmp_path / "empty"))
    assert prepare(elsewhere).fingerprint == prepared.fingerprint
    other = dataclasses.replace(elsewhere, tokenizer=TokenizerConfig(path="bytes"))
    with pytest.raises(UserError, match=r"was prepared with Tokenizer.*set data.tokenizer.path"):
        prepare(other)


def test_a_folder_made_from_other_files_is_not_taken_for_these(config, tmp_path):
    prepare_into(alone(config, tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="other files or settings"):
        prepare_into(alone(config, tmp_path, held_out_fraction=0.5), tmp_path / "out")


def test_an_empty_corpus_is_refused_with_what_was_left_out(source, tmp_path):
    config = DataConfig(sources=(source(" \n"),), cache=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"source 'made' is empty: 1 files.*1 blank"):
        prepare(config)
    assert partials(config) == []


def test_bad_input_leaves_nothing_behind(source, tmp_path):
    config = DataConfig(
        sources=(source(b"\xff"),), tokenizer=TokenizerConfig(path="bytes"), cache=str(tmp_path / "c")
    )
    with pytest.raises(UserError, match=r"data.txt:1: byte 0xff"):
        prepare(config)
    assert partials(config) == folders(config) == []


def test_a_full_disk_is_said_and_leaves_nothing_behind(config, tmp_path, monkeypatch):
    mine = alone(config, tmp_path)

    def full(self, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.HashingFile, "write", full)
        with pytest.raises(RunError, match=r"No space left on device \(\d+ MiB free there\)"):
            prepare(mine)
    assert partials(mine) == folders(mine) == []
    prepare(mine).verify()


def test_a_cache_that_cannot_be_written_is_said(config, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"data\.cache` or \$MAXSTACK_CACHE"):
        prepare(alone(config, tmp_path))


def test_a_flipped_byte_in_any_file_is_found(config, tmp_path):
    source = prepare(alone(config, tmp_path)).sources["plays"]
    source.verify()
    for name in source.meta["files"]:
        file = source.folder / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            PreparedSource(source.folder).verify()
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    PreparedSource(source.folder).verify()


def test_a_cut_missing_or_altered_file_is_found_on_open(config, tmp_path):
    source = prepare(alone(config, tmp_path)).sources["plays"]
    tokens = source.folder / "train.tokens.000.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=f"{len(whole) - 2} bytes, meta.json says {len(whole)}"):
        PreparedSource(source.folder)
    tokens.unlink()
    with pytest.raises(UserError, match="missing"):
        PreparedSource(source.folder)
    tokens.write_bytes(whole)
    meta = source.folder / "meta.json"
    good = meta.read_text()
    for bad, words in [
        (good[:-20], "damaged"),
        (good.replace('"documents": ', '"documents": 1'), "checksum"),
        (good.replace('"version": 1', '"version": 2'), "format version 2"),
        ("[]", "does not describe"),
    ]:
        meta.write_text(bad)
        with pytest.raises(UserError, match=words):
            PreparedSource(source.folder)
    meta.unlink()
    with pytest.raises(UserError, match=r"no meta.json"):
        PreparedSource(source.folder)


@pytest.mark.parametrize("moment", ["before it is read", "between the passes"])
def test_a_file_that_changes_while_it_is_prepared_is_noticed(config, tmp_path, moment):
    copy = tmp_path / "copy"
    shutil.copytree(config.sources[0].path, copy)
    mine = alone(config, tmp_path, path=str(copy))

    def meddle(progress):
        if progress.stage == "read" and (progress.total > 0) == (moment == "between the passes"):
            (copy / "30.txt").write_text("meddled with")

    with pytest.raises(UserError, match=r"30.txt(:1)? changed while"):
        prepare(mine, meddle)
    assert folders(mine) == []


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path, source):
    # Only the held-out document has the letters "zq" in a row, a thousand times.
    common = [f"document {n} has words and words\n" * 40 for n in range(20)]
    rare = "zq" * 1000
    made = source("\n---\n".join([*common, rare]), separator="\n---\n")

    def merges(fraction: float) -> str:
        changed = dataclasses.replace(made, held_out_fraction=fraction)
        config = DataConfig(
            sources=(changed,), tokenizer=TokenizerConfig(vocab_size=300), cache=str(tmp_path / str(fraction))
        )
        found = prepare(config)
        held = b"zq" in found.sources["made"].held_out_text()
        assert held == (fraction > 0.5)
        return found.tokenizer.definition

    # 0.95 holds out all but the document of the largest hash, which is a common one.
    assert '"zq"' in merges(0.0)
    assert '"zq"' not in merges(0.95)


SCRIPT = """
import json, sys, time
from maxstack.data.config import *
from maxstack.data.prepare import prepare
path, cache, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
source, tokenizer = SourceConfig(name="plays", path=path), TokenizerConfig(vocab_size=300)
config = DataConfig(sources=(source,), tokenizer=tokenizer, cache=cache)
import maxstack.data.prepare as module
module.GROUP_DOCUMENTS = 4
def report(progress):
    print(progress.stage, progress.done, flush=True)
    time.sleep(delay)
print("fingerprint", prepare(config, report).fingerprint, flush=True)
"""


def start(path: str, cache: Path, delay: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path, str(cache), str(delay)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wanted_fingerprint(path: str, tmp_path: Path) -> str:
    config = DataConfig(
        sources=(SourceConfig(name="plays", path=path),),
        tokenizer=TokenizerConfig(vocab_size=300),
        cache=str(tmp_path / "undisturbed"),
    )
    return prepare(config).fingerprint


def check_after_kill(config: DataConfig, path: str, cache: Path, wanted: str) -> None:
    """Whatever is there opens and is whole; preparing again gives what an undisturbed run gives, and tidies up."""
    for folder in [p for p in cache.glob("prepared/*") if not p.name.startswith(".")]:
        PreparedSource(folder).verify()
    again = start(path, cache, 0)
    output, _ = again.communicate(timeout=60)
    assert f"fingerprint {wanted}" in output
    assert list(cache.rglob("*.partial")) == []


@pytest.mark.parametrize("stage", ["train tokenizer", "tokenise"])
def test_killed_while_preparing_leaves_nothing_half_believed(config, tmp_path, stage):
    path, cache = str(config.sources[0].path), tmp_path / "cache"
    process = start(path, cache, 0.05)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith(stage)
        if seen == (2 if stage == "tokenise" else 1):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(cache.rglob("*.partial"))) == 1  # it was in the middle of something
    check_after_kill(config, path, cache, wanted_fingerprint(path, tmp_path))


@pytest.mark.kill
def test_killed_at_random_moments(config, tmp_path):
    path = str(config.sources[0].path)
    wanted = wanted_fingerprint(path, tmp_path)
    rng = np.random.default_rng()
    for trial in range(20):
        cache = tmp_path / str(trial)
        process = start(path, cache, 0.02)
        time.sleep(rng.uniform(0.3, 2))
        process.kill()
        process.communicate()
        check_after_kill(config, path, cache, wanted)


def test_processes_that_prepare_at_once_share_one_result(config, tmp_path):
    path, cache = str(config.sources[0].path), tmp_path / "cache"
    processes = [start(path, cache, 0.01) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    fingerprints = {
        line for output in outputs for line in output.splitlines() if line.startswith("fingerprint")
    }
    assert fingerprints == {f"fingerprint {wanted_fingerprint(path, tmp_path)}"}
    # One of them tokenised; the others waited.
    assert sum("tokenise" in output for output in outputs) == 1
    assert len([p for p in cache.glob("prepared/*") if not p.name.startswith(".")]) == 1


def test_the_layout_is_as_documented(prepared):
    """Reads a folder with numpy and json alone, by docs/data.md."""
    folder = prepared.sources["poems"].folder
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.fromfile(folder / "train.tokens.000.bin", meta["dtype"])
    offsets = np.fromfile(folder / "train.offsets.bin", "<u8")
    origins = np.fromfile(folder / "train.origins.bin", "<u4").reshape(-1, 2)
    texts = np.fromfile(folder / "held_out.text_offsets.bin", "<u8")
    assert len(tokens) == offsets[-1] == meta["splits"]["train"]["tokens"]
    assert len(origins) == len(offsets) - 1 == meta["splits"]["train"]["documents"]
    assert meta["inputs"][origins[0, 0]].endswith("rows.jsonl")
    assert texts[-1] == (folder / "held_out.text.bin").stat().st_size
    for name, entry in meta["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
