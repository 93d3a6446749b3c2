"""How families of models write calls of tools: the one table that names them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from maxstack.chat.parsing.bodies import Body, JsonBody
from maxstack.chat.parsing.tagged import TaggedBody
from maxstack.config import UserError


@dataclass(frozen=True, kw_only=True)
class Style:
    """One way to write calls."""

    name: str
    opens: tuple[str, ...]
    """Texts that a call begins with."""
    closes: str = ""
    """The text after it, "" for none."""
    between: str = ""
    """Characters that may stand between two calls, besides blanks."""
    bare: bool = False
    """An answer that begins with the body itself is a call too, and so is what follows one."""
    body: Callable[[Mapping[str, Any]], Body] = JsonBody
    marks: tuple[str, ...] = ()
    """Special tokens in these texts: they must come with the text."""
    signs: tuple[tuple[str, ...], ...] = ()
    """Words of which a chat template, or the vocabulary, has all of one group, when its model writes so."""
    written: tuple[str, str, str] = ("", "", "")
    """Before a call's name, before its arguments and after them, as the model has learned to write."""
    joint: str = "\n"
    """What the model writes between two calls."""


HERMES = Style(
    name="hermes",
    opens=("<tool_call>",),
    closes="</tool_call>",
    marks=("<tool_call>", "</tool_call>"),
    signs=(("<tool_call>",),),
    written=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
)
QWEN_CODER = Style(
    name="qwen3-coder",
    opens=("<tool_call>",),
    closes="</tool_call>",
    body=TaggedBody,
    marks=("<tool_call>", "</tool_call>"),
    signs=(("<function=", "<parameter="),),
    written=("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>"),
)
LLAMA_3 = Style(
    name="llama3",
    opens=("<|python_tag|>",),
    between=";",
    bare=True,
    marks=("<|python_tag|>",),
    signs=(("<|start_header_id|>", "ipython"), ("<|python_tag|>",)),
    written=('{"name": "', '", "parameters": ', "}"),
    joint="; ",
)
INTERNLM = Style(
    name="internlm",
    opens=("<|action_start|><|plugin|>",),
    closes="<|action_end|>",
    marks=("<|action_start|>", "<|plugin|>", "<|action_end|>", "<|interpreter|>"),
    signs=(("<|action_start|>",), ("<|plugin|>",)),
    written=('<|action_start|><|plugin|>\n{"name": "', '", "parameters": ', "}<|action_end|>"),
)

ORDER = (INTERNLM, QWEN_CODER, HERMES, LLAMA_3)
"""In which signs are looked for: Qwen3-Coder's template has those of Hermes too."""
STYLES: dict[str, Style] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen2.5": HERMES,
    "qwen3": HERMES,
    "qwen3-coder": QWEN_CODER,
    "llama3": LLAMA_3,
    "internlm": INTERNLM,
    "internlm2": INTERNLM,
    "internlm3": INTERNLM,
}


def style_for(name_or_template: str, vocabulary: Collection[str] = ()) -> Style | None:
    """The style of a name, or of the model with this chat template and these added tokens; None where there is none.

    Raises UserError for a name that is not known: a template has braces, a name has none.
    """
    if name_or_template in STYLES:
        return STYLES[name_or_template]
    if name_or_template and "{" not in name_or_template:
        raise UserError(
            f"there is no style of tool calls called {name_or_template!r}: known are {', '.join(STYLES)}"
        )
    for style in ORDER:
        for words in style.signs:
            if all(word in name_or_template or word in vocabulary for word in words):
                return style
    return None
