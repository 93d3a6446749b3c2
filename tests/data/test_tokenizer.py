import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import RunError, UserError
from maxstack.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
    well_formed,
)

TEXTS = [
    "to be or not to be, that is the question\n" * 20,
    "whether 'tis nobler in the mind 1234 é 漢字\n" * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(TEXTS), 320)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    for tokenizer in (byte_tokenizer(), TRAINED):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


TRAINED = train_bpe(iter(TEXTS), 300)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_byte_ids_are_the_bytes(text):
    assert byte_tokenizer().encode(text) == list(text.encode())


def test_special_token_in_the_text_stays_text(tokenizer):
    text = f"a {END_OF_TEXT} b"
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids, skip_special=False) == text


def test_begin_and_end_are_the_one_special_token(tokenizer):
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.token_id(END_OF_TEXT)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("to be")]) == "to be"


def test_batch_equals_one_by_one(tokenizer):
    texts = ["", "to be", "\n\n", "é漢", "x" * 1000]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("broken", "fixed"),
    [("a\ud800b", "a\ufffdb"), ("\udc00", "\ufffd"), ("\ud83d\ude00", "😀"), ("plain", "plain")],
)
def test_half_a_surrogate_pair_is_replaced(tokenizer, broken, fixed):
    assert well_formed(broken) == fixed
    assert tokenizer.decode(tokenizer.encode(broken)) == fixed
    assert tokenizer.decode(tokenizer.encode_batch([broken])[0]) == fixed


def test_training_is_deterministic_across_processes_and_threads():
    script = (
        f"from maxstack.data.tokenizer import train_bpe; print(train_bpe(iter({TEXTS!r}), 320).fingerprint)"
    )
    found = set()
    for parallel in ("true", "false"):
        environment = {
            "TOKENIZERS_PARALLELISM": parallel,
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "PATH": "",
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.strip())
    assert found == {train_bpe(iter(TEXTS), 320).fingerprint}


def test_fingerprint_changes_with_the_vocabulary(tokenizer):
    assert tokenizer.fingerprint != train_bpe(iter(TEXTS), 290).fingerprint


def test_saved_folder_opens_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "whether 'tis nobler  in the mind: 567\n\ttabs é"
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert theirs.decode(again.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_file_and_folder_and_pickled_copy_are_the_same(tokenizer, tmp_path):
    import copy

    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    # A worker process gets a copy; one that forgot how to treat specials in text would encode other ids.
    assert copy.deepcopy(tokenizer).encode(END_OF_TEXT) == tokenizer.encode(END_OF_TEXT)


def test_specials_come_from_the_config_beside_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"bos_token": None, "eos_token": {"content": END_OF_TEXT}}))
    again = load_tokenizer(tmp_path)
    assert again.bos_id is None
    assert again.eos_id == tokenizer.eos_id
    file.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(UserError, match="<nowhere>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "not JSON"), ('{"a": 1}', "no 'model'"), ('{"model": {"type": "BPE"}}', "definition")],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content, word):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=word) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_tokenizer_and_too_small_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(iter(TEXTS), 100)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of a Hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache: Path) -> Path:
    """Where the cache keeps the files of owner/name."""
    place = cache / "models--owner--name"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("0" * 40)
    return place / "snapshots" / ("0" * 40)


def test_a_tokenizer_by_name_comes_from_the_cache_without_the_hub(tokenizer, hub_cache):
    tokenizer.save(snapshot(hub_cache))
    assert load_tokenizer("hf:owner/name").fingerprint == tokenizer.fingerprint
    # Many have no config beside; offline that is no obstacle.
    (snapshot(hub_cache) / "tokenizer_config.json").unlink()
    assert load_tokenizer("hf:owner/name").eos_id == tokenizer.eos_id


def test_what_is_not_cached_is_fetched_the_tokenizer_files_only(tokenizer, hub_cache, monkeypatch):
    asked = []

    def download(repository, *, allow_patterns, local_files_only=False):
        asked.append((repository, allow_patterns, local_files_only))
        if not local_files_only:
            tokenizer.save(snapshot(hub_cache))
        return str(snapshot(hub_cache))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        assert load_tokenizer("hf:owner/name").fingerprint == tokenizer.fingerprint
    files = ["tokenizer.json", "tokenizer_config.json"]
    assert asked == [("owner/name", files, local) for local in (True, False, True)]


def test_an_unreachable_hub_is_said_with_the_cache_and_how_to_fill_it(hub_cache):
    with pytest.raises(RunError, match="tokenizer of owner/name is not in the cache") as caught:
        load_tokenizer("hf:owner/name")
    assert str(hub_cache) in str(caught.value)
    assert "hf download owner/name tokenizer.json tokenizer_config.json" in str(caught.value)


def test_a_wrong_name_and_a_repository_without_tokenizer_are_refused(hub_cache):
    with pytest.raises(UserError, match="'hf:a/b/c' names no repository: give hf:owner/name"):
        load_tokenizer("hf:a/b/c")
    snapshot(hub_cache).mkdir(parents=True)
    with pytest.raises(UserError, match=r"owner/name has no tokenizer\.json"):
        load_tokenizer("hf:owner/name")
