"""Decoding token by token."""

import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from maxstack.config import UserError
from maxstack.data.tokenizer import StreamDecoder, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"


def metaspace(scheme: str) -> Tokenizer:
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["a", "▁", "▁b", "▁▁c", "é"])}, merges=[])
    )
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return Tokenizer(inner.to_str())


def without_decoder() -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc")}, merges=[])).to_str()
    )


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "trained": train_bpe(iter(["to be or not to be, é漢字😀 " * 30]), 300),
    **{
        kind: load_tokenizer(GOLDENS / f"{kind}.model")
        for kind in ("bpe", "bpe_no_prefix", "bpe_squeezed", "unigram")
    },
    "metaspace": metaspace("always"),
    "metaspace_never": metaspace("never"),
    "none": without_decoder(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip_special", [True, False])
def test_the_parts_are_the_whole(name, skip_special):
    tokenizer = TOKENIZERS[name]
    # The low ids are special tokens and bytes, which is where it is hard.
    ids = st.one_of(st.integers(0, min(tokenizer.vocab_size, 262)), st.integers(0, tokenizer.vocab_size + 1))

    @settings(max_examples=150, deadline=None)
    @given(st.lists(ids, max_size=30))
    def check(sequence):
        decoder = StreamDecoder(tokenizer, skip_special=skip_special)
        parts = [decoder.push(token_id) for token_id in sequence]
        assert "".join(parts) + decoder.finish() == tokenizer.decode(sequence, skip_special=skip_special)

    check()


@pytest.mark.parametrize("name", ["bytes", "trained", "bpe", "bpe_no_prefix", "unigram"])
def test_never_half_a_character(name):
    text = "你好 😀👩‍👩‍👧 e\u0301é\n\n  Ж 龘𠮷"
    tokenizer = TOKENIZERS[name]
    decoder, grown = StreamDecoder(tokenizer), ""
    for token_id in tokenizer.encode(text):
        grown += decoder.push(token_id)
        assert text.startswith(grown)
    assert grown == text
    assert decoder.finish() == ""


def test_what_never_was_completed_comes_at_the_end():
    decoder = StreamDecoder(byte_tokenizer())
    assert [decoder.push(byte) for byte in "好".encode()[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.push(65) + decoder.finish() == "A"


def test_a_good_character_beside_a_bad_byte_is_kept():
    """As sentencepiece has it; `tokenizers` makes U+FFFD of all four bytes."""
    tokenizer = TOKENIZERS["bpe"]
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in [*"好".encode(), 0xFF]]
    assert tokenizer.decode(ids) == "好\ufffd"


def test_a_token_costs_the_same_however_long_the_text():
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer.encode("the cat 😀 ") * 4000
    decoder, times = StreamDecoder(tokenizer), []
    for start in range(0, len(ids), len(ids) // 8):
        began = time.perf_counter()
        for token_id in ids[start : start + len(ids) // 8]:
            decoder.push(token_id)
        times.append(time.perf_counter() - began)
    # In a decoder that begins again each time the last part takes 15 times as long as the first.
    assert min(times[4:]) < 3 * max(times[:2])


def test_a_decoder_that_cannot_be_followed_is_refused_by_name():
    inner = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(inner.to_str())
    assert tokenizer.decode([0, 1]) == "ab"
    with pytest.raises(UserError, match="this one is WordPiece"):
        StreamDecoder(tokenizer)


def test_special_tokens_that_somebody_looks_for_are_in_the_text_and_others_are_not():
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().definition)
    inner.add_special_tokens(["<|mark|>", "<|other|>"])
    tokenizer = Tokenizer(inner.to_str())
    decoder = StreamDecoder(tokenizer, keep=("<|mark|>", "<|unknown|>"))
    ids = tokenizer.encode("a<|mark|>b<|other|>c", special=True)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == "a<|mark|>bc"
    assert "".join(map(StreamDecoder(tokenizer).push, ids)) == "abc"
