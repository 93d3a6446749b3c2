"""A whole answer: thoughts first, then text and calls."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from maxstack.chat.parsing.calls import Calls, new_id
from maxstack.chat.parsing.pieces import Piece, Reasoning, Text, joined
from maxstack.chat.parsing.styles import Style, style_for
from maxstack.chat.reasoning import Splitter, tags_of


class Parser:
    """Takes an answer's text as it comes; however it is cut, the pieces joined are the same."""

    def __init__(
        self, style: Style | None, thoughts: tuple[str, str] | None = None, *, prompt: str = "",
        schemas: Mapping[str, Any] | None = None, ids: Callable[[], str] = new_id,
    ):  # fmt: skip
        """`thoughts` are the tags of reasoning. Without a style there are no calls, without tags no reasoning."""
        self._splitter = Splitter(thoughts, prompt)
        self._calls = None if style is None else Calls(style, schemas, ids)
        marks = () if style is None else style.marks
        self.marks: tuple[str, ...] = (*marks, *(thoughts or ()))
        """Tokens that must come with the text, also where they are special ones: see `keep` of `AsyncEngine.open`."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain with this text."""
        if self._calls is None and self._splitter.over:
            return [Text(text)] if text else []
        return joined(self._sorted(self._splitter.push(text)))

    def end(self) -> list[Piece]:
        """The rest, when the answer is over."""
        pieces = self._sorted(self._splitter.finish())
        return joined(pieces if self._calls is None else pieces + self._calls.end())

    def _sorted(self, cut: Sequence[Any]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in cut:
            if part.kind == "reasoning":
                pieces.append(Reasoning(part.text))
            elif self._calls is None:
                pieces.append(Text(part.text))
            else:
                pieces += self._calls.feed(part.text)
        return pieces


def parser_for(
    name_or_template: str | Mapping[str, str] | None, *, style: str | None = None, vocabulary: Collection[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "", reasoning: bool = True,
    ids: Callable[[], str] = new_id,
) -> Parser:  # fmt: skip
    """The parser for a model, by the name of a style ("hermes", "llama3", …) or by its chat template, of which `style`
    may be the name where that does not tell.

    `vocabulary` are its added tokens, which tell what a template may not; `prompt` is the rendered one, which may have
    opened the thoughts. With `tools=[]` no calls are looked for; None takes calls of any name.
    """
    templates = name_or_template if isinstance(name_or_template, Mapping) else {"": name_or_template or ""}
    text = "\n".join(templates.values())
    found = None if tools is not None and not tools else style_for(style or text, vocabulary)
    thoughts = tags_of(text) if reasoning else None
    return Parser(found, thoughts, prompt=prompt, schemas=schemas_of(tools), ids=ids)


def schemas_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """The schemas of tools' arguments, by name."""
    if tools is None:
        return None
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}
