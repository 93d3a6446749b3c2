"""The files of a tokenizer, and writing them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxstack.config import UserError, write_atomically

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
MODEL_CONFIG_FILES = ("generation_config.json", "config.json")
# Settings that no longer hold for the files that are written: code of the source's, and a class of transformers' that
# would build rules of its own beside those in tokenizer.json.
_LEFT_OUT = ("auto_map", "chat_template", "tokenizer_class", "tokenizer_file", "name_or_path", "vocab_file")


def write_files(
    folder: Path,
    definition: str,
    settings: Mapping[str, Any],
    specials: Mapping[str, str],
    template: str | Mapping[str, str] | None,
) -> None:
    """Write a tokenizer so that transformers' AutoTokenizer gives the same ids."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in settings.items() if key not in _LEFT_OUT},
        **specials,
    }
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    for name, text in named.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"chat template {name!r}: a name of letters, digits, _ and - is needed for its file"
            )
        path = folder / TEMPLATE_FILE if name == "default" else folder / TEMPLATE_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text.encode())
    write_atomically(folder / TOKENIZER_FILE, definition.encode())
    for file, content in ((CONFIG_FILE, config), (SPECIALS_FILE, dict(specials))):
        write_atomically(folder / file, json.dumps(content, indent=2, ensure_ascii=False).encode())
