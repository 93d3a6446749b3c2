"""A tokenizer from the metadata of a GGUF file, whose keys llama.cpp's gguf-py/gguf/constants.py lists."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer.opening import tokenizer_from_json
from maxstack.data.tokenizer.sentencepiece_file import Algorithm, Kind, Piece, SentencePiece
from maxstack.data.tokenizer.sentencepiece_rules import sentencepiece_definition
from maxstack.data.tokenizer.settings import post_processor, special_entry
from maxstack.data.tokenizer.splits import ALIASES, SPLITS, named_split, pre_tokenizer
from maxstack.data.tokenizer.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPECIALS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
STOPS = ("eot_token_id", "eom_token_id")
# llama.cpp stops at these as well, whatever the file says: many files name only one of a model's end tokens.
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)

UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 behind which white space is kept, as it is not behind its others."""


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file carries.

    Raises UserError for a kind or a rule of cutting words that is not supported, with those that are, and for metadata
    that contradicts itself.
    """
    kind = metadata.get(PREFIX + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind is None:
        raise UserError(f"the GGUF file carries no tokenizer: it has no {PREFIX}model")
    if kind not in builders:
        raise UserError(f"GGUF tokenizer {kind!r} is not supported; these are: {', '.join(builders)}")
    pieces = _pieces(metadata)
    settings = _settings(metadata, pieces)
    definition, settings = builders[kind](metadata, pieces, settings)
    if strips(metadata.get("general.name")):
        definition = _stripping(definition)
    return tokenizer_from_json(
        definition, settings, _stops(metadata, pieces), where="the GGUF file's tokenizer"
    )


def strips(name: Any) -> bool:
    """Whether llama.cpp drops the white space behind a model's special tokens: it goes by the model's name."""
    return isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))


def _stripping(definition: str) -> str:
    parsed = json.loads(definition)
    for entry in parsed["added_tokens"]:
        entry["rstrip"] = entry["content"] not in UNSTRIPPED
    return json.dumps(parsed, ensure_ascii=False)


def _array(
    metadata: Mapping[str, Any], key: str, kind: type | tuple[type, ...], size: int | None = None
) -> Sequence[Any]:
    value = metadata.get(PREFIX + key)
    tolist = getattr(value, "tolist", None)
    value = tolist() if tolist else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, kind) for one in value):
        raise UserError(f"the GGUF file's {PREFIX}{key} is missing or not the list it should be")
    if size is not None and len(value) != size:
        raise UserError(f"the GGUF file has {len(value)} {PREFIX}{key} for {size} tokens")
    return value


def _pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    tokens = _array(metadata, "tokens", str)
    size = len(tokens)
    if not size or len({*tokens}) != size:
        raise UserError("the GGUF file's tokens are none, or one of them comes twice")
    kinds = _array(metadata, "token_type", int, size) if PREFIX + "token_type" in metadata else [1] * size
    scores = _array(metadata, "scores", (int, float), size) if PREFIX + "scores" in metadata else [0.0] * size
    if not {*kinds} <= {*map(int, Kind), 0}:
        raise UserError(f"the GGUF file's token types are {sorted({*kinds})}; types are 1 to {max(Kind)}")
    return [
        Piece(text, float(score), Kind(kind or Kind.NORMAL))
        for text, score, kind in zip(tokens, scores, kinds, strict=True)
    ]


def _id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """A token id among the metadata; llama.cpp passes over one that is out of range."""
    value = metadata.get(PREFIX + key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"the GGUF file's {PREFIX}{key} is {value!r} where an id belongs")
    return value if value is not None and 0 <= value < size else None


def _settings(metadata: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
    """What a tokenizer_config.json would say."""
    found: dict[str, Any] = {}
    for name, key in SPECIALS.items():
        token_id = _id(metadata, key, len(pieces))
        if token_id is not None or name in ("bos_token", "eos_token"):
            found[name] = None if token_id is None else pieces[token_id].text
    for key in ("add_bos_token", "add_eos_token"):
        if PREFIX + key in metadata:
            found[key] = bool(metadata[PREFIX + key])
    names = {key.removeprefix(TEMPLATE + "."): key for key in metadata if key.startswith(TEMPLATE + ".")}
    templates = {name: metadata[key] for name, key in names.items()}
    if TEMPLATE in metadata:
        found["chat_template"] = (
            {"default": metadata[TEMPLATE], **templates} if templates else metadata[TEMPLATE]
        )
    elif templates:
        found["chat_template"] = templates
    return found


def _stops(metadata: Mapping[str, Any], pieces: Sequence[Piece]) -> tuple[int, ...]:
    named = [_id(metadata, key, len(pieces)) for key in STOPS]
    known = [i for i, piece in enumerate(pieces) if piece.text in ENDS and piece.kind != Kind.NORMAL]
    return tuple(i for i in (*named, *known) if i is not None)


def _byte_level(
    metadata: Mapping[str, Any], pieces: Sequence[Piece], settings: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    name = metadata.get(PREFIX + "pre")
    split = named_split(name) if isinstance(name, str) else None
    if split is None:
        known = ", ".join(sorted({*SPLITS, *ALIASES, "glm4", "glm5"}))
        raise UserError(
            f"the GGUF file cuts words by {name!r} ({PREFIX}pre), which is not supported; these are: {known}"
        )
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    settings = {"add_bos_token": split.starts, **settings}
    merges = [_merge(text, ids) for text in _array(metadata, "merges", str)]
    special = {Kind.CONTROL, Kind.UNKNOWN}
    added = [
        {**special_entry(i, piece.text), "special": piece.kind in special}
        for i, piece in enumerate(pieces)
        if piece.kind in special or piece.kind == Kind.USER_DEFINED
    ]
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if split.compose else None,
        "pre_tokenizer": pre_tokenizer(split.patterns), "post_processor": post_processor(settings, ids),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": split.whole_words, "vocab": ids,
            "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(definition, ensure_ascii=False), settings


def _merge(text: str, tokens: Mapping[str, int]) -> list[str]:
    left, _, right = text[1:].partition(" ")  # the first character may itself be a space
    left = text[:1] + left
    if not (left in tokens and right in tokens and left + right in tokens):
        raise UserError(f"the GGUF file merges {text!r}, of which a part or the whole is no token")
    return [left, right]


def _sentencepiece(
    metadata: Mapping[str, Any], pieces: Sequence[Piece], settings: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """SentencePiece's BPE, which the files call "llama"; they hold its pieces with scores, and no rules."""
    unk = _id(metadata, "unknown_token_id", len(pieces))
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN), -1)
    model = SentencePiece(
        pieces=tuple(pieces), algorithm=Algorithm.BPE,
        byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
        unk_id=unknown if unk is None else unk, bos_id=-1, eos_id=-1,
        dummy_prefix=bool(metadata.get(PREFIX + "add_space_prefix", True)),
        remove_extra_spaces=bool(metadata.get(PREFIX + "remove_extra_whitespaces", False)),
    )  # fmt: skip
    return sentencepiece_definition(
        model, {"add_bos_token": True, **settings}, where="the GGUF file's tokenizer"
    )
