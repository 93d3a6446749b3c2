"""How things are written in llguidance's kind of Lark."""

import json
import re
from collections.abc import Iterable

from maxstack.data.tokenizer import Tokenizer

ANYTHING = r"/(.|\n)*/"
STYLE = {"whitespace_pattern": r"\x20|\x0A[\x20\x09]{0,40}"}
"""White space between the parts of JSON: one blank, or one line end and its indentation. Without a bound, small models
go on with blanks for ever."""


def quoted(text: str) -> str:
    """A text."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def special_tokens(tokenizer: Tokenizer, marks: Iterable[str]) -> dict[str, int]:
    """Those of some texts that are special tokens, and their ids."""
    found = {mark: tokenizer.token_id(mark) for mark in marks}
    return {mark: i for mark, i in found.items() if i is not None and i in tokenizer.special_ids}


def written(text: str, special: dict[str, int]) -> str:
    """A text in which some parts are special tokens."""
    if not special:
        return quoted(text)
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return " ".join(f"<[{special[part]}]>" if part in special else quoted(part) for part in parts if part)


def up_to(mark: str) -> str:
    """The rule "lead": any text and then a mark, which is `written`."""
    return f"lead: TEXT {mark}" if mark.startswith("<[") else f"lead[lazy]: TEXT {mark}"
