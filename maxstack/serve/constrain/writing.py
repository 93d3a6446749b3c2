"""How things are written in llguidance's kind of Lark."""

import json

STYLE = {"whitespace_pattern": r"\x20|\x0A[\x20\x09]{0,40}"}
"""White space between the parts of JSON: one blank, or one line end and its indentation. Without a bound, small models
go on with blanks for ever."""


def quoted(text: str) -> str:
    """A text."""
    return json.dumps(text).replace("\x7f", "\\u007f")
