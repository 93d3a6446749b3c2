"""The metadata of a GGUF file for a tokenizer: the inverse of `tokenizer_from_gguf`."""

import json
from collections.abc import Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer.gguf_read import PREFIX, SPECIALS, STOPS, TEMPLATE, UNSTRIPPED
from maxstack.data.tokenizer.pieces import BYTE, decoder_steps
from maxstack.data.tokenizer.sentencepiece_file import Kind, Piece
from maxstack.data.tokenizer.sentencepiece_rules import SPACE, merges
from maxstack.data.tokenizer.settings import content
from maxstack.data.tokenizer.splits import SPLITS, split_name
from maxstack.data.tokenizer.tokenizer import Tokenizer

_NEVER = -1000.0  # llama.cpp's score for a token that text never becomes


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int | None = None) -> dict[str, Any]:
    """Keys "tokenizer.…" for llama.cpp, whose embedding has a row a token: give `vocab_size` where it has more.

    With "general.name" where llama.cpp goes by that.

    Raises UserError for a tokenizer that llama.cpp could not do alike.
    """
    parsed = json.loads(tokenizer.definition)
    if parsed["model"].get("type") != "BPE":
        kind = parsed["model"].get("type")
        raise UserError(
            f"a {kind} tokenizer is not written to GGUF; BPE is, of bytes or as SentencePiece has it"
        )
    if _is_sentencepiece(parsed):
        found = _sentencepiece(tokenizer, parsed, vocab_size)
    else:
        found = _byte_level(tokenizer, parsed, vocab_size)
    named = {"general.name": "phi3"} if _strips_spaces(tokenizer) else {}
    return {PREFIX + key: value for key, value in found.items()} | _templates(tokenizer) | named


def _strips_spaces(tokenizer: Tokenizer) -> bool:
    """Whether white space behind its special tokens is dropped as llama.cpp does it for models that are called phi3."""
    added = tokenizer.inner.get_added_tokens_decoder().values()
    flags = {token.content: token.rstrip for token in added}
    return {"</s>", *UNSTRIPPED} <= flags.keys() and all(
        flag == (text not in UNSTRIPPED) for text, flag in flags.items()
    )


def _is_sentencepiece(parsed: Mapping[str, Any]) -> bool:
    return bool(parsed["model"].get("byte_fallback")) or SPACE in json.dumps(
        parsed["decoder"], ensure_ascii=False
    )


def _byte_level(tokenizer: Tokenizer, parsed: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    normalizers = _steps(parsed["normalizer"], "normalizers")
    pairs = _pairs(parsed)
    name = split_name(tokenizer.inner) if pairs else next(iter(SPLITS))  # without merges no word matters
    if name is None or any(step["type"] != "NFC" for step in normalizers):
        raise UserError(
            "llama.cpp has no name known here for the way this tokenizer cuts words or rewrites text; those of these "
            f"are written: {', '.join(SPLITS)}"
        )
    if not pairs:
        raise UserError("llama.cpp reads no tokenizer without merges; write a model folder")
    pieces = _pieces(tokenizer, vocab_size)
    return {
        "model": "gpt2", "pre": name, **_tokens(pieces), "merges": [f"{left} {right}" for left, right in pairs],
        **_ids(tokenizer),
    }  # fmt: skip


def _sentencepiece(tokenizer: Tokenizer, parsed: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    dummy = _dummy_prefix(parsed)
    ranks: dict[str, int] = {}
    pairs = _pairs(parsed)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    pieces = [
        piece._replace(score=-float(ranks[piece.text]) if piece.text in ranks else _score(piece))
        for piece in _pieces(tokenizer, vocab_size)
    ]
    # llama.cpp joins whatever makes a token; a list of merges could have left some out, or put them in between.
    if not {*map(tuple, merges(pieces))} <= {*map(tuple, pairs)}:
        raise UserError(
            "this BPE's merges are not those of a SentencePiece model; GGUF has no place for them"
        )
    spelled = [
        # It looks for them in the text as it comes.
        piece._replace(text=piece.text.replace(SPACE, " ")) if piece.kind == Kind.USER_DEFINED else piece
        for piece in pieces
    ]
    return {
        "model": "llama", "pre": "default", **_tokens(spelled), "scores": [piece.score for piece in spelled],
        "add_space_prefix": dummy, **_ids(tokenizer),
    }  # fmt: skip


def _score(piece: Piece) -> float:
    return 0.0 if piece.kind in (Kind.NORMAL, Kind.BYTE) else _NEVER


def _dummy_prefix(parsed: Mapping[str, Any]) -> bool:
    """Whether a space comes before the text. Raises UserError for rules that are not SentencePiece's without a map."""
    dummy = False
    for step in _steps(parsed["normalizer"], "normalizers"):
        match step:
            case {"type": "Prepend", "prepend": str(text)} if text == SPACE:
                dummy = True
            case {"type": "Replace", "content": str(text)} if text == SPACE:
                pass
            case {"type": "Replace", "pattern": {"Regex": str(p)}, "content": ""} if p.startswith(
                rf"\A{SPACE}(?="
            ):
                pass  # where the prefix would hide a symbol from `tokenizers`
            case _:
                raise UserError(f"llama.cpp has no normalizer {step['type']} for SentencePiece's tokenizers")
    for step in _steps(parsed["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Metaspace", "prepend_scheme": str(scheme), "split": False}:
                dummy = dummy or scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # there are no spaces left to split at
            case _:
                raise UserError(
                    f"llama.cpp does not cut words by {step['type']} in SentencePiece's tokenizers"
                )
    return dummy


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _pairs(parsed: Mapping[str, Any]) -> list[list[str]]:
    """Merges, which older files write as one text."""
    found = parsed["model"].get("merges") or []
    return [list(one) if isinstance(one, (list, tuple)) else one.split(" ", 1) for one in found]


def _pieces(tokenizer: Tokenizer, vocab_size: int | None) -> list[Piece]:
    size = max(tokenizer.vocab_size, vocab_size or 0)
    fallback = any(step["type"] == "ByteFallback" for step in decoder_steps(tokenizer.inner))
    found = []
    for i in range(size):
        text = tokenizer.token(i)
        if text is None:
            found.append(Piece(f"[PAD{i}]", _NEVER, Kind.UNUSED))
        elif text in tokenizer.added_tokens:
            special = Kind.UNKNOWN if i == tokenizer.unk_id else Kind.CONTROL
            kind = special if tokenizer.added_tokens[text] else Kind.USER_DEFINED
            found.append(Piece(text, 0.0, kind))
        else:
            found.append(Piece(text, 0.0, Kind.BYTE if fallback and BYTE.fullmatch(text) else Kind.NORMAL))
    return found


def _tokens(pieces: list[Piece]) -> dict[str, Any]:
    return {"tokens": [piece.text for piece in pieces], "token_type": [int(piece.kind) for piece in pieces]}


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in SPECIALS.items():
        text = content(tokenizer.special_tokens.get(name))
        token_id = None if text is None else tokenizer.token_id(text)
        if token_id is not None:
            found[key] = token_id
    others = [one for one in tokenizer.stop_ids if one != tokenizer.eos_id]
    found |= dict(zip(STOPS, others, strict=False))
    alone = tokenizer.inner.encode("", add_special_tokens=True).ids
    for key, token_id in (("add_bos_token", tokenizer.bos_id), ("add_eos_token", tokenizer.eos_id)):
        found[key] = bool(tokenizer.settings.get(key, token_id is not None and token_id in alone))
    return found


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return {} if template is None else {TEMPLATE: template}
    named = {name: text for name, text in template.items() if name != "default"}
    found: dict[str, Any] = {f"{TEMPLATE}.{name}": text for name, text in named.items()}
    if named:
        found[f"{TEMPLATE}s"] = list(named)
    return {TEMPLATE: template["default"], **found} if "default" in template else found
