"""What the files beside a tokenizer say of it: special tokens, chat templates, added tokens, ids that stop."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer.files import (
    ADDED_FILE,
    CONFIG_FILE,
    MODEL_CONFIG_FILES,
    SPECIALS_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TEMPLATE_JSON_FILE,
)

_MOST_BYTES = 64 << 20  # of a JSON file of settings; Gemma's, the largest seen, has 1 MB
_MOST_TEMPLATE = 1 << 20
DEFAULT = "default"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def content(token: Any) -> str | None:
    """The text of a special token, which files write as a text or as an object with flags."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"{CONFIG_FILE}: a special token is {token!r} where a text belongs")
    return token


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the tokens that have a name of their own, "eos_token" or "image_token"."""
    named = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, (str, dict))}
    return {key: text for key, value in named.items() if (text := content(value)) is not None}


def chat_template(settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template or templates of a tokenizer_config.json, which lists several as [{"name", "template"}, …]."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        wrong = [
            entry for entry in found if not isinstance(entry, dict) or not {"name", "template"} <= {*entry}
        ]
        if wrong:
            raise UserError(f"{CONFIG_FILE}: an entry of chat_template has no name and template")
        found = {entry["name"]: entry["template"] for entry in found}
    texts = found.values() if isinstance(found, dict) else [] if found is None else [found]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{CONFIG_FILE}: chat_template is neither a text nor a list of named texts")
    return found or None


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, completed from the files that older and newer models keep beside it.

    Raises UserError for what is not JSON. Nothing named in it is run: `auto_map` stays a text.
    """
    config, specials = read_object(folder / CONFIG_FILE), read_object(folder / SPECIALS_FILE)
    added = _old_added(read_object(folder / ADDED_FILE), {**specials, **config})
    settings = {**specials, **config}
    if added or "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {**added, **settings.get("added_tokens_decoder", {})}
    template = _template_files(folder)
    if template is not None:
        settings["chat_template"] = template
    return settings


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    if file.stat().st_size > _MOST_BYTES:
        raise UserError(f"{file} has {file.stat().st_size} bytes; at most {_MOST_BYTES} are read")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object but {type(found).__name__}")
    return found


def _template_files(folder: Path) -> str | dict[str, str] | None:
    """Templates in files of their own, which come before those of the config."""
    named = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        named = {DEFAULT: folder / TEMPLATE_FILE, **named}
    texts = {name: _template_text(path) for name, path in named.items()}
    if not texts:
        return read_object(folder / TEMPLATE_JSON_FILE).get("chat_template")
    return texts[DEFAULT] if [*texts] == [DEFAULT] else texts


def _template_text(file: Path) -> str:
    if file.stat().st_size > _MOST_TEMPLATE:
        raise UserError(f"{file} has {file.stat().st_size} bytes; a chat template may have {_MOST_TEMPLATE}")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error


def _old_added(added: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens.json, which has no flags, in the form of `added_tokens_decoder`."""
    special = {*named_tokens(settings).values(), *extra_tokens(settings)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        str(i): {"content": text, **flags, "normalized": text not in special, "special": text in special}
        for text, i in added.items()
    }


def extra_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name."""
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        entries = value.values() if isinstance(value, dict) else value
        found += [text for entry in entries if (text := content(entry)) is not None]
    return found


def added_tokens(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens of `added_tokens_decoder` as entries of a definition, by id."""
    found = {}
    for key, value in (settings.get("added_tokens_decoder") or {}).items():
        if not str(key).isdecimal() or content(value) is None:
            raise UserError(f"{CONFIG_FILE}: added_tokens_decoder has {key!r}: {value!r} for a token")
        flags = {"normalized": True} | (value if isinstance(value, dict) else {})
        entry = {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
        found[int(key)] = {"id": int(key), "content": content(value), **entry}
    return found


def special_entry(token_id: int, text: str) -> dict[str, Any]:
    """A special token as an entry of a definition."""
    flags = dict.fromkeys(_FLAGS, False) | {"special": True}
    return {"id": token_id, "content": text, **flags}


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a generation by a model folder's own account, in generation_config.json or else config.json.

    Raises UserError when one is no id.
    """
    for name in MODEL_CONFIG_FILES:
        config = read_object(folder / name)
        found = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
            raise UserError(f"{folder / name}: eos_token_id is {found!r} where ids belong")
        return tuple(ids)
    return ()


def post_processor(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """What puts begin and end tokens around a text, as a step of a definition: for other programs, never used here."""
    ends = {key: content(settings.get(f"{key}_token")) for key in ("bos", "eos")}
    wanted = {key: text for key, text in ends.items() if text in ids and settings.get(f"add_{key}_token")}
    if not wanted:
        return None
    around = {key: [{"SpecialToken": {"id": text, "type_id": 0}}] for key, text in wanted.items()}

    def surrounded(letters: str) -> list[dict[str, Any]]:
        texts = [{"Sequence": {"id": letter, "type_id": 0}} for letter in letters]
        return [*around.get("bos", []), *texts, *around.get("eos", [])]

    tokens = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in wanted.values()}
    return {
        "type": "TemplateProcessing", "single": surrounded("A"), "pair": surrounded("AB"), "special_tokens": tokens,
    }  # fmt: skip
