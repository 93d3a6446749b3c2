"""Opening a tokenizer: a folder of any real model, one of its files, a name."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.data import hub
from maxstack.data.tokenizer.files import CONFIG_FILE, SENTENCEPIECE_FILE, TOKENIZER_FILE
from maxstack.data.tokenizer.sentencepiece_file import read_sentencepiece
from maxstack.data.tokenizer.sentencepiece_rules import sentencepiece_definition
from maxstack.data.tokenizer.settings import (
    added_tokens,
    extra_tokens,
    named_tokens,
    read_settings,
    special_entry,
    stop_ids,
)
from maxstack.data.tokenizer.tokenizer import Tokenizer
from maxstack.data.tokenizer.training import byte_tokenizer

BYTES = "bytes"
_MOST_BYTES = 512 << 20  # of tokenizer.json; Gemma 3's has 33 MB


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Open a model folder (tokenizer.json, else SentencePiece's tokenizer.model, with what lies beside), either file
    alone, "hf:owner/name" on the Hub, or "bytes".

    No code of the folder runs. Raises UserError for what is no tokenizer, RunError when the Hub cannot be reached and
    its cache has no copy.
    """
    if str(name_or_path) == BYTES:
        return byte_tokenizer()
    if str(name_or_path).startswith(hub.PREFIX):
        name_or_path = hub.hub_folder(str(name_or_path), (TOKENIZER_FILE, CONFIG_FILE))
    file = _file_at(Path(name_or_path).expanduser())
    if file.stat().st_size > _MOST_BYTES:
        raise UserError(f"{file} has {file.stat().st_size} bytes; a tokenizer may have {_MOST_BYTES}")
    settings = read_settings(file.parent)
    if file.suffix == ".model":
        pieces = read_sentencepiece(file)
        definition, settings = sentencepiece_definition(pieces, settings, where=str(file))
        tokenizer = tokenizer_from_json(definition, settings, stop_ids(file.parent), where=str(file))
        return _check_ids(tokenizer, str(file))
    try:
        definition = file.read_text(encoding="utf-8")
        parsed = json.loads(definition)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if isinstance(parsed, dict) and "model" in parsed:
        definition = with_added(definition, parsed, settings, where=str(file))
    tokenizer = tokenizer_from_json(definition, settings, stop_ids(file.parent), where=str(file))
    return _check_ids(tokenizer, str(file))


def _file_at(path: Path) -> Path:
    """The file that holds the tokenizer at a place."""
    files = [path / TOKENIZER_FILE, path / SENTENCEPIECE_FILE] if path.is_dir() else [path]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"no tokenizer at {path}: give a folder with {TOKENIZER_FILE} or {SENTENCEPIECE_FILE}, such a file, "
            f'"{hub.PREFIX}owner/name" on the Hub, or "{BYTES}"'
        )
    return found


def tokenizer_from_json(
    definition: str,
    settings: dict[str, Any] | None = None,
    stop_ids: tuple[int, ...] = (),
    *,
    where: str = "",
) -> Tokenizer:
    """Build a tokenizer from the text of its files, or say what is wrong with them."""
    try:
        return Tokenizer(definition, settings, stop_ids)
    except UserError:
        raise
    except Exception as error:  # the binding raises plain Exception for every malformed definition
        place = where or "the definition"
        try:
            parsed = json.loads(definition)
        except json.JSONDecodeError as reason:
            raise UserError(f"{place} is not JSON: {reason}") from reason
        if not isinstance(parsed, dict) or "model" not in parsed:
            raise UserError(f"{place} is JSON but no tokenizer: it has no 'model'") from error
        raise UserError(f"{place} is no tokenizer definition: {error}") from error


def with_added(definition: str, parsed: dict[str, Any], settings: dict[str, Any], *, where: str) -> str:
    """The definition, with the added and special tokens that only the settings know, as transformers adds them.

    Raises UserError when the two disagree about an id.
    """
    present = {entry["content"]: entry for entry in parsed.get("added_tokens") or []}
    wanted = {entry["content"]: entry for entry in added_tokens(settings).values()}
    vocabulary = parsed["model"].get("vocab") or {}
    ids = (
        {token: i for i, (token, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    )
    for text in (*named_tokens(settings).values(), *extra_tokens(settings)):
        # One that has no id anywhere is left out: no row of the model's embedding is its.
        if text not in present and text not in wanted and text in ids:
            wanted[text] = special_entry(ids[text], text)
    for text, entry in wanted.items():
        other = present[text]["id"] if text in present else ids.get(text, entry["id"])
        if other != entry["id"]:
            raise UserError(
                f"{where} gives {text!r} the id {other}, {CONFIG_FILE} beside it {entry['id']}; correct one of them"
            )
    merged = sorted({**present, **wanted}.values(), key=lambda entry: entry["id"])
    renamed = _placeholders(ids, merged) if isinstance(vocabulary, dict) else {}
    if merged == list(present.values()) and not renamed:
        return definition
    model = parsed["model"]
    if renamed:
        model = {**model, "vocab": {renamed.get(token, token): i for token, i in ids.items()}}
    return json.dumps({**parsed, "model": model, "added_tokens": merged}, ensure_ascii=False)


def _placeholders(ids: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Vocabulary entries whose ids added tokens have taken over ("[UNUSED_TOKEN_146]"), and what they are now."""
    taken = {entry["id"]: entry["content"] for entry in added if entry["content"] not in ids}
    return {token: taken[i] for token, i in ids.items() if i in taken}


def _check_ids(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """The library numbers added tokens as they come, whatever the files say: only what they agree on is opened."""
    for i, entry in added_tokens(tokenizer.settings).items():
        if tokenizer.token_id(entry["content"]) != i:
            raise UserError(
                f"{CONFIG_FILE} adds {entry['content']!r} as {i}, but the ids of {where} end before that"
            )
    return tokenizer
