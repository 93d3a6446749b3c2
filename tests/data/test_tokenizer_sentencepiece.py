"""tokenizer.model against what the sentencepiece library made of the same strings (goldens/tokenizers)."""

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer, load_tokenizer, well_formed
from maxstack.data.tokenizer.sentencepiece_file import parse_sentencepiece

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"
STRINGS = json.loads((GOLDENS / "hard_strings.json").read_text())
KINDS = sorted(path.stem for path in GOLDENS.glob("*.model"))
LOSSLESS = ["bpe", "bpe_no_prefix", "bpe_symbols", "unigram"]
# The three differences that the module's docstring states.
MARKS = "e\u0301\u0301\u0302\u0327 Z͑ͫ̓ͪ̂ͫ̽"
KNOWN = {"bpe_rules": [MARKS], "unigram_rules": [MARKS], "bpe_symbols": ["<user>"]}


def opened(kind: str) -> Tokenizer:
    return load_tokenizer(GOLDENS / f"{kind}.model")


def folder_of(kind: str, tmp_path: Path, **config) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((GOLDENS / f"{kind}.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_sentencepiece_library(kind):
    tokenizer, golden = opened(kind), json.loads((GOLDENS / f"{kind}.json").read_text())
    scores = [piece.score for piece in parse_sentencepiece((GOLDENS / f"{kind}.model").read_bytes()).pieces]

    def same(ids: list[int], wanted: list[int]) -> bool:
        """The same ids; of a unigram model also others of the same score, between which it has no choice."""
        total = [math.fsum(scores[i] for i in one) for one in (ids, wanted)]
        return ids == wanted or (kind.startswith("unigram") and abs(total[0] - total[1]) < 1e-4)

    wrong = [
        text
        for text, ids in zip(STRINGS, golden["ids"], strict=True)
        if not same(tokenizer.encode(text), ids)
    ]
    assert wrong == KNOWN.get(kind, [])
    assert tokenizer.encode_batch(STRINGS) == [tokenizer.encode(text) for text in STRINGS]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_random_ids_is_that_of_the_sentencepiece_library(kind):
    tokenizer, golden = opened(kind), json.loads((GOLDENS / f"{kind}.json").read_text())
    assert (
        any("\ufffd" in text for _, text in golden["decoded"]) or "bpe_squeezed unigram_rules".find(kind) >= 0
    )
    for ids, text in golden["decoded"]:
        assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"])),
    st.sampled_from(LOSSLESS),
)
def test_any_text_comes_back(text, kind):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not tokenizer.special_ids & set(ids)


LOADED = {kind: opened(kind) for kind in LOSSLESS}


def test_the_special_ids_are_the_models_own():
    tokenizer = opened("bpe_no_prefix")
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.special_tokens["pad_token"] == "<pad>"
    assert tokenizer.added_tokens["<sep>"] is False
    assert tokenizer.added_tokens["</s>"] is True
    assert opened("bpe").pad_id is None


def test_control_text_becomes_a_control_token_only_when_asked():
    for kind in KINDS:
        tokenizer = opened(kind)
        assert tokenizer.eos_id not in tokenizer.encode("a</s>b"), kind
        assert tokenizer.eos_id in tokenizer.encode("a</s>b", special=True), kind


def test_placeholders_are_renamed_and_tokens_go_on_behind_as_the_config_says(tmp_path):
    taken = opened("bpe_symbols").token_id("[UNUSED_TOKEN_146]")
    decoder = {
        str(taken): {"content": "<|im_start|>", "special": True, "normalized": False},
        "700": {"content": "<tool>", "special": False, "normalized": False},
    }
    tokenizer = load_tokenizer(folder_of("bpe_symbols", tmp_path, added_tokens_decoder=decoder))
    assert tokenizer.token_id("<|im_start|>") == taken
    assert tokenizer.token_id("[UNUSED_TOKEN_146]") is None
    assert tokenizer.encode("<|im_start|>user", special=True)[0] == taken
    assert taken not in tokenizer.encode("<|im_start|>user")
    assert 700 in tokenizer.encode("a<tool>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9999": "<far>"}}))
    with pytest.raises(UserError, match=r"'<far>' as 9999.*ids are missing"):
        load_tokenizer(tmp_path)


def test_the_prefix_comes_after_each_special_token_or_before_the_text_alone(tmp_path):
    """As transformers has it for `legacy` true and false."""
    bpe = opened("bpe")
    old = load_tokenizer(folder_of("bpe", tmp_path)).encode("</s>the", special=True)
    assert old == [bpe.eos_id, *bpe.encode("the")]
    new = load_tokenizer(folder_of("bpe", tmp_path, legacy=False))
    ids = new.encode("the</s>the", special=True)
    assert ids[: ids.index(new.eos_id)] == bpe.encode("the")
    assert new.decode(ids) == "thethe"
    for text in STRINGS:
        assert new.encode(text) == bpe.encode(text)
    none = load_tokenizer(folder_of("bpe", tmp_path, add_prefix_space=False))
    assert none.decode(none.encode("the")) == "the"
    assert none.encode("the") != bpe.encode("the")


def test_saved_it_opens_in_transformers_with_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    for kind in KINDS:
        tokenizer = opened(kind)
        tokenizer.save(tmp_path / kind)
        (tmp_path / kind / "config.json").write_text('{"model_type": "llama"}')
        theirs = AutoTokenizer.from_pretrained(tmp_path / kind)
        for text in map(well_formed, STRINGS):
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, special=True)
            plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert plain == tokenizer.encode(text)
        assert theirs.encode("a")[0] == tokenizer.bos_id
        assert load_tokenizer(tmp_path / kind).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("data", [b"", b"{}", b"\x0a\xff", b"IQ== 0\nIg== 1\n", b"\x0a\x03\x0a\x01"])
def test_a_file_that_is_no_sentencepiece_model_is_refused_by_name(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_damaged_models_are_refused_or_opened_but_nothing_else(tmp_path):
    import random

    whole, rng = (GOLDENS / "bpe.model").read_bytes(), random.Random(0)
    file = tmp_path / "tokenizer.model"
    for _ in range(60):
        data = bytearray(whole[: rng.randrange(1, len(whole))])
        data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            load_tokenizer(file)


@pytest.mark.oracle
def test_live_sentencepiece_agrees_on_random_text():
    sentencepiece = pytest.importorskip("sentencepiece")
    import random

    rng = random.Random(1)
    pool = [*"abcdefgh  ▁\n\t1２é", "the ", "你好", "😀", "<sep>", "</s>"]
    for kind in ("bpe", "bpe_no_prefix", "bpe_squeezed"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(GOLDENS / f"{kind}.model"))
        tokenizer = opened(kind)
        for _ in range(1000):
            text = "".join(rng.choice(pool) for _ in range(rng.randint(0, 30)))
            assert tokenizer.encode(text) == processor.encode(text)
