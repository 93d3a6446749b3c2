"""The golden templates and renders, and small tokenizers that know every template's special tokens."""

import functools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from maxstack.data.chat import ChatRenderer
from maxstack.data.tokenizer import Tokenizer
from tests.goldens.chat.conversations import CASES, SPECIALS, TOKENS

FOLDER = Path(__file__).parents[2] / "goldens" / "chat"
NAMES = sorted(TOKENS)
DATE = datetime(2025, 3, 9, 12)


@functools.cache
def template(name: str) -> str:
    """The text of a published template."""
    return (FOLDER / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def renders(name: str) -> dict[str, dict[str, str]]:
    """By case, what transformers made of it."""
    return json.loads((FOLDER / "renders" / f"{name}.json").read_text(encoding="utf-8"))


def _texts() -> list[str]:
    found = [found["text"] for name in NAMES for found in renders(name).values() if "text" in found]
    special = re.compile("|".join(map(re.escape, SPECIALS)))
    return [piece for text in found for piece in special.split(text)]


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(words: bool) -> tuple[tokenizers.Tokenizer, Any]:
    inner = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")] if words else []
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return inner, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)


def _blank_level(scheme: str) -> tuple[tokenizers.Tokenizer, Any]:
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return inner, trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)


KINDS = {
    "byte words": lambda: _byte_level(True),
    "byte runs": lambda: _byte_level(False),  # merges go over any border of words, lines and messages
    "blank first": lambda: _blank_level("first"),
    "blank always": lambda: _blank_level("always"),
    "blank by normalizer": lambda: _blank_level("normalizer"),
}


@functools.cache
def definition(kind: str = "byte words") -> str:
    """A tokenizer.json, trained on the golden texts; special tokens have the ids from 5000."""
    inner, trainer = KINDS[kind]()
    inner.train_from_iterator(_texts(), trainer)
    found = json.loads(inner.to_str())
    found["added_tokens"] = [entry for entry in found["added_tokens"] if entry["content"] == "<unk>"]
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    first = max(found["model"]["vocab"].values()) + 1
    for index, text in enumerate(SPECIALS):
        # Phi-3's tokens take the white space after them.
        stripped = text in ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>") and kind == "blank first"
        found["added_tokens"].append({"id": first + index, "content": text, "rstrip": stripped, **flags})
    return json.dumps(found)


@functools.cache
def tokenizer(name: str, kind: str = "byte words") -> Tokenizer:
    """A small tokenizer with the begin and end tokens of a template's model."""
    begin, end = TOKENS[name]
    return Tokenizer(
        definition(kind),
        {"bos_token": begin or None, "eos_token": end or None, "chat_template": template(name)},
    )


@functools.cache
def renderer(name: str, kind: str = "byte words") -> ChatRenderer:
    """The renderer of a template, on the day of the goldens."""
    return ChatRenderer(tokenizer(name, kind), template(name), now=fixed_date)


def fixed_date() -> datetime:
    """The day of the goldens."""
    return DATE


def answered(name: str) -> list[str]:
    """Cases that a template renders whole and that end with an answer."""
    return [case for case in CASES if case in GOOD[name] and not _prompt(CASES[case])]


def _prompt(case: dict[str, Any]) -> bool:
    return bool(case.get("add_generation_prompt") or case.get("continue_final_message"))


def _whole(name: str, case: str) -> bool:
    """Rendered, and with the tools and calls that it was given."""
    found = renders(name)[case].get("text")
    if found is None:
        return False
    given = CASES[case]
    calls = any("tool_calls" in message for message in given["messages"])
    described = found.count("The weather at a place") == len(given.get("tools", ())[:1])
    return described and (not calls or found.count("Zürich") > 1)


GOOD = {name: [case for case in CASES if _whole(name, case)] for name in NAMES}
"""Cases of each template in which nothing that was given is missing."""
