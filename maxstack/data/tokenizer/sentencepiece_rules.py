"""A SentencePiece model as the text of a tokenizer.json that gives the same ids.

SentencePiece applies the normalizer's rules, squeezes spaces, puts a space before the text (the dummy prefix), writes
spaces as "▁", keeps user-defined symbols whole, and cuts the rest by its model over the whole text.

Known to differ from it: the normalizer's rules on a letter with several combining marks (`tokenizers` applies them a
grapheme at a time; models without rules, which are all those of InternLM, Llama, Mistral and Gemma, are not touched);
two ways to cut that a unigram model finds equally good; and, after a dummy prefix, a text that is one user-defined
symbol and nothing else, which then has no prefix.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer.files import CONFIG_FILE
from maxstack.data.tokenizer.sentencepiece_file import Algorithm, Kind, Piece, SentencePiece
from maxstack.data.tokenizer.settings import (
    added_tokens,
    extra_tokens,
    named_tokens,
    post_processor,
    special_entry,
)

SPACE = "▁"
_ANY = 1 << 16
Step = dict[str, Any]


def sentencepiece_definition(
    model: SentencePiece, settings: Mapping[str, Any], *, where: str
) -> tuple[str, dict[str, Any]]:
    """Text of a tokenizer.json, and the settings with the special tokens that the model itself names.

    Raises UserError for what cannot be said in that form.
    """
    if model.algorithm not in (Algorithm.BPE, Algorithm.UNIGRAM):
        raise UserError(
            f"{where} is a {model.algorithm.name} model of SentencePiece; BPE and UNIGRAM are read"
        )
    if model.space_as_suffix or not model.escape_spaces:
        raise UserError(
            f"{where} writes spaces after words or as they are (treat_whitespace_as_suffix, escape_whitespaces); "
            "such SentencePiece models are not read"
        )
    settings = own_specials(model, settings)
    pieces, added = joined(model, settings, where)
    dummy = model.dummy_prefix and settings.get("add_prefix_space") is not False
    first_only = settings.get("legacy") is False
    symbols = [entry["content"] for entry in added if not entry["special"]]
    unk = settings.get("unk_token") if 0 <= model.unk_id < len(pieces) else None
    unk = unk.get("content") if isinstance(unk, dict) else unk
    build = bpe if model.algorithm == Algorithm.BPE else unigram
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": normalizer(model, symbols, dummy and not first_only),
        "pre_tokenizer": prefix_of_first() if dummy and first_only else None,
        "post_processor": post_processor(settings, {piece.text: i for i, piece in enumerate(pieces)}),
        "decoder": decoder(model, dummy),
        "model": build(pieces, model, unk),
    }  # fmt: skip
    return json.dumps(definition, ensure_ascii=False), settings


def own_specials(model: SentencePiece, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the special tokens that the model names, and a start token put first unless told otherwise."""
    ids = {"unk": model.unk_id, "bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
    found = {f"{k}_token": model.pieces[i].text for k, i in ids.items() if 0 <= i < len(model.pieces)}
    return {"add_bos_token": "bos_token" in found, **found, **settings}


def joined(model: SentencePiece, settings: Mapping[str, Any], where: str) -> tuple[list[Piece], list[Step]]:
    """Pieces and added tokens. Those of the settings come over the model's, naming placeholders, or go on behind."""
    pieces, wanted = list(model.pieces), added_tokens(settings)
    taken = {piece.text: i for i, piece in enumerate(pieces)}
    for i, entry in sorted(wanted.items()):
        text = entry["content"]
        if taken.get(text, i) != i:
            raise UserError(f"{where} gives {text!r} the id {taken[text]}, {CONFIG_FILE} beside it {i}")
        if i > len(pieces):
            raise UserError(
                f"{CONFIG_FILE} adds {text!r} as {i}, but {where} ends at {len(pieces)}: ids are missing"
            )
        kind = Kind.CONTROL if entry["special"] else Kind.USER_DEFINED
        if i < len(pieces):
            kind = pieces[i].kind if pieces[i].kind == Kind.UNKNOWN else kind
            pieces[i] = Piece(text, pieces[i].score, kind)
        else:
            pieces.append(Piece(text, 0.0, kind))
        taken[text] = i
    special = {*named_tokens(settings).values(), *extra_tokens(settings)}
    added = []
    for i, piece in enumerate(pieces):
        if i in wanted:
            entry = wanted[i] if wanted[i]["special"] else symbol(i, piece.text)
            added.append(entry)
        elif piece.kind in (Kind.CONTROL, Kind.UNKNOWN) or piece.text in special:
            added.append(special_entry(i, piece.text))
        elif piece.kind == Kind.USER_DEFINED:
            added.append(symbol(i, piece.text))
    return pieces, added


def symbol(token_id: int, text: str) -> Step:
    """A user-defined symbol: found in the text as SentencePiece has rewritten it, so that spaces around it stay."""
    return {**special_entry(token_id, text), "special": False, "normalized": True}


def normalizer(model: SentencePiece, symbols: Sequence[str], dummy: bool) -> Step:
    steps: list[Step] = []
    if model.charsmap:
        rules = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": rules})
    if model.remove_extra_spaces:
        # Spaces only: SentencePiece keeps line ends and tabs that its rules have not made spaces.
        steps += [_replace({"Regex": rf"\A +|[ {SPACE}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if dummy:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace({"String": " "}, SPACE))
    if dummy and symbols:
        # `tokenizers` looks for a symbol as the normalizer would rewrite it alone: alone it must stay as it is.
        alone = "|".join(
            re.escape(text.replace(" ", SPACE)) for text in sorted(symbols, key=len, reverse=True)
        )
        steps.append(_replace({"Regex": rf"\A{SPACE}(?=(?:{alone})\z)"}, ""))
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}


def _replace(pattern: Step, content: str) -> Step:
    return {"type": "Replace", "pattern": pattern, "content": content}


def prefix_of_first() -> Step:
    """The dummy prefix before the text alone, not after each special token in it.

    Metaspace leaves out the prefix of what begins with a space; with " " for its sign it sees none, all being "▁" by
    then.
    """
    shared = {"type": "Metaspace", "split": False}
    first = {**shared, "replacement": " ", "prepend_scheme": "first"}
    return {
        "type": "Sequence",
        "pretokenizers": [first, {**shared, "replacement": SPACE, "prepend_scheme": "never"}],
    }


def decoder(model: SentencePiece, dummy: bool) -> Step:
    steps: list[Step] = [_replace({"String": SPACE}, " ")]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if dummy or model.remove_extra_spaces:
        # A model that never sees a space before the text drops any number of them.
        start = _ANY if model.remove_extra_spaces else 1
        steps.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def bpe(pieces: Sequence[Piece], model: SentencePiece, unk: str | None) -> Step:
    return {
        "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.byte_fallback, "ignore_merges": False,
        "vocab": {piece.text: i for i, piece in enumerate(pieces)}, "merges": merges(pieces),
    }  # fmt: skip


def merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best first.

    SentencePiece joins the pair whose result has the highest score, `tokenizers` the one that comes first in a list.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == Kind.NORMAL}
    found: list[list[str]] = []
    for text in sorted(ids, key=lambda one: (-pieces[ids[one]].score, ids[one])):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        both = [(ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids]
        found += [[left, right] for _, _, left, right in sorted(both)]
    return found


def unigram(pieces: Sequence[Piece], model: SentencePiece, unk: str | None) -> Step:
    """Pieces that text never becomes get a score below any path of the others: `tokenizers` takes all for words."""
    least = min((piece.score for piece in pieces if piece.kind == Kind.NORMAL), default=0.0)
    never = 100.0 * (least - 10.0)
    scores = [piece.score if piece.kind == Kind.NORMAL else never for piece in pieces]
    return {
        "type": "Unigram", "unk_id": model.unk_id if unk is not None else None,
        "byte_fallback": model.byte_fallback,
        "vocab": [[piece.text, score] for piece, score in zip(pieces, scores, strict=True)],
    }  # fmt: skip
