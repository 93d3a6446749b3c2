"""A tokenizer as real model folders keep it: several files beside each other, and written again."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import tokenizers

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer, load_tokenizer, stop_ids, train_bpe, well_formed

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"
STRINGS = json.loads((GOLDENS / "hard_strings.json").read_text())
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}\n"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.fixture(scope="module")
def definition() -> str:
    """As chat models have it: special tokens behind the vocabulary, one of a tool's that is not special."""
    inner = tokenizers.Tokenizer.from_str(
        train_bpe(iter(["to be or not to be <tool> " * 20]), 300).definition
    )
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return inner.to_str()


def folder_of(tmp_path: Path, definition: str, **files) -> Path:
    (tmp_path / "tokenizer.json").write_text(definition)
    for name, content in files.items():
        stem, _, kind = name.rpartition("_")
        text = content if kind == "jinja" else json.dumps(content)
        (tmp_path / f"{stem}.{kind}").write_text(text)
    return tmp_path


def test_all_special_ids_and_texts_are_read(tmp_path, definition):
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<nowhere>", "image_token": "<img>"}
    specials = {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    generation = {"eos_token_id": [301, 0], "bos_token_id": 300}
    folder = folder_of(
        tmp_path, definition, tokenizer_config_json=config, special_tokens_map_json=specials,
        generation_config_json=generation, config_json={"eos_token_id": 7},
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (start, end, 0, None)
    assert tokenizer.stop_ids == tuple(dict.fromkeys([end, 301, 0]))
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<nowhere>",
        "image_token": "<img>",
    }  # fmt: skip
    assert tokenizer.added_tokens["<tool>"] is False


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config_json": {"eos_token_id": 3}, "config_json": {"eos_token_id": 4}}, (3,)),
        ({"generation_config_json": {}, "config_json": {"eos_token_id": [4, 5]}}, (4, 5)),
        ({"config_json": {"text_config": {"eos_token_id": 6}}}, (6,)),
        ({}, ()),
    ],
)
def test_stop_ids_of_a_folder(tmp_path, definition, files, ids):
    assert stop_ids(folder_of(tmp_path, definition, **files)) == ids


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], True, -1])
def test_a_stop_id_that_is_none_is_refused(tmp_path, definition, wrong):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is"):
        load_tokenizer(folder_of(tmp_path, definition, generation_config_json={"eos_token_id": wrong}))


def test_special_text_becomes_special_only_when_asked(tmp_path, definition):
    tokenizer = load_tokenizer(folder_of(tmp_path, definition))
    text = "a<|im_start|>to be<|im_end|>"
    plain, asked = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.special_ids & set(asked) == {
        300 - 300 + tokenizer.token_id(t) for t in ("<|im_start|>", "<|im_end|>")
    }
    assert tokenizer.decode(plain) == tokenizer.decode(plain, skip_special=False) == text
    assert tokenizer.decode(asked) == "ato be"
    assert tokenizer.decode(asked, skip_special=False) == text
    assert tokenizer.encode(text) == plain  # asking once changes nothing
    assert tokenizer.encode_batch([text, "b"], special=True) == [asked, tokenizer.encode("b")]
    # A token that is not special is a word like any other.
    assert tokenizer.token_id("<tool>") in tokenizer.encode("a <tool> b")


def test_templates_of_every_kind_are_found_and_files_come_before_the_config(tmp_path, definition):
    load = lambda **files: load_tokenizer(folder_of(tmp_path, definition, **files)).chat_template  # noqa: E731
    assert load() is None
    assert load(chat_template_json={"chat_template": "old"}) == "old"
    assert load(tokenizer_config_json={"chat_template": "a"}, chat_template_json={}) == "a"
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    assert load(tokenizer_config_json={"chat_template": named}) == {"default": "a", "rag": "b"}
    assert load(chat_template_jinja=TEMPLATE) == TEMPLATE
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert load() == {"default": TEMPLATE, "tool_use": "t"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config_json": {"chat_template": 3}}, "neither a text nor a list"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "a"}]}}, "no name and template"),
        ({"tokenizer_config_json": {"bos_token": 3}}, "special token is 3"),
        ({"tokenizer_config_json": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "'x'"),
        ({"tokenizer_config_json": [1]}, "no JSON object but list"),
        ({"chat_template_jinja": "x" * (1 << 20) + "y"}, "a chat template may have"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, definition, files, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder_of(tmp_path, definition, **files))


def test_code_in_the_folder_is_not_run_and_not_passed_on(tmp_path, definition):
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    folder = folder_of(tmp_path, definition, tokenizer_config_json=config)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.settings["auto_map"] == config["auto_map"]


def test_added_tokens_that_only_the_config_knows_are_added(tmp_path, definition):
    size = load_tokenizer(folder_of(tmp_path, definition)).vocab_size
    added = {str(size): {"content": "<new>", "special": True, **FLAGS}}
    config = {"added_tokens_decoder": added, "eos_token": "<new>"}
    tokenizer = load_tokenizer(folder_of(tmp_path, definition, tokenizer_config_json=config))
    assert tokenizer.eos_id == tokenizer.token_id("<new>") == size
    assert tokenizer.encode("<new>", special=True) == [size]
    assert size not in tokenizer.encode("<new>")
    (tmp_path / "tokenizer_config.json").unlink()
    old = folder_of(
        tmp_path,
        definition,
        added_tokens_json={"<new>": size},
        special_tokens_map_json={"eos_token": "<new>"},
    )
    assert load_tokenizer(old).encode("a<new>", special=True) == tokenizer.encode("a<new>", special=True)


def test_ids_on_which_the_files_disagree_are_refused(tmp_path, definition):
    config = {"added_tokens_decoder": {"5": {"content": "<tool>"}}}
    with pytest.raises(UserError, match=r"gives '<tool>' the id \d+, tokenizer_config.json beside it 5"):
        load_tokenizer(folder_of(tmp_path, definition, tokenizer_config_json=config))
    config = {"added_tokens_decoder": {"9999": {"content": "<far>"}}}
    with pytest.raises(UserError, match="adds '<far>' as 9999"):
        load_tokenizer(folder_of(tmp_path, definition, tokenizer_config_json=config))


def test_a_special_token_in_the_vocabulary_alone_becomes_one(tmp_path, definition):
    """As transformers treats what the config calls the end token."""
    config = {"eos_token": "to"}
    tokenizer = load_tokenizer(folder_of(tmp_path, definition, tokenizer_config_json=config))
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_saved_it_is_the_same_here_and_in_transformers(tmp_path, definition):
    from transformers import AutoTokenizer

    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "model_max_length": 99,
    }  # fmt: skip
    tokenizer = load_tokenizer(
        folder_of(tmp_path, definition, tokenizer_config_json=config, chat_template_jinja=TEMPLATE)
    )
    out = tmp_path / "out"
    tokenizer.save(out)
    (out / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == theirs.chat_template == TEMPLATE
    assert theirs.model_max_length == 99
    assert set(theirs.all_special_ids) <= tokenizer.special_ids
    for text in map(well_formed, STRINGS):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, special=True)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(
            text
        )
    several = Tokenizer(
        definition, {"chat_template": [{"name": "a", "template": "x"}, {"name": "default", "template": "y"}]}
    )
    several.save(tmp_path / "several")
    assert (
        load_tokenizer(tmp_path / "several").chat_template
        == several.chat_template
        == {"default": "y", "a": "x"}
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "several").chat_template == several.chat_template
    with pytest.raises(UserError, match=r"'\.\./a'"):
        Tokenizer(definition, {"chat_template": {"../a": "x"}}).save(tmp_path / "bad")


def test_a_copy_keeps_everything(definition):
    tokenizer = Tokenizer(definition, {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}, stop_ids=(3, 4))
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.stop_ids == tokenizer.stop_ids
        assert other.chat_template == TEMPLATE
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


def test_saved_files_end_a_generation_where_the_tokenizer_did(definition, tmp_path):
    several = Tokenizer(definition, {"eos_token": "<|im_end|>"}, stop_ids=(3, 4))
    several.save(tmp_path / "several")
    assert len(several.stop_ids) == 3
    assert load_tokenizer(tmp_path / "several").stop_ids == several.stop_ids
    Tokenizer(definition, {"eos_token": "<|im_end|>"}).save(tmp_path / "one")
    assert not (tmp_path / "one" / "generation_config.json").exists()


def test_the_fingerprint_is_what_it_always_was():
    """Prepared data remembers it: sha256 of the definition and the begin and end ids, in canonical JSON."""
    from maxstack.data.tokenizer import byte_tokenizer

    assert byte_tokenizer().fingerprint == FINGERPRINT


FINGERPRINT = "dfd7faf3394d0dc447c41247266f805030938ca40fd68714f1c81b1622e5953b"
