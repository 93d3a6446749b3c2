"""What is asked, in the words of llguidance; refused here where it is too large or too deep to be tried."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from maxstack.data.tokenizer import Tokenizer
from maxstack.serve.constrain.constraint import BadConstraint, Bounds, Constraint
from maxstack.serve.constrain.schema import checked_schema
from maxstack.serve.constrain.tools import tool_rules
from maxstack.serve.constrain.writing import ANYTHING, STYLE, quoted, special_tokens, up_to, written

JSON_OBJECT = {"type": "object"}


def checked_text(constraint: Constraint, bounds: Bounds) -> str:
    """A constraint's value as text, by which it is known again. Raises BadConstraint for one that cannot be."""
    value = constraint.value
    if constraint.kind not in SOURCES:
        raise BadConstraint(f"the kind is {constraint.kind!r}; kinds are {', '.join(SOURCES)}")
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise BadConstraint(f"{constraint.kind}: the value is not plain JSON data: {error}") from error
    if size > bounds.source_bytes:
        raise BadConstraint(
            f"{constraint.kind}: the value has {size:,} bytes; at most {bounds.source_bytes:,} are taken"
        )
    return text


def _plain(value: Any) -> Any:
    if hasattr(value, "plain"):
        return value.plain()
    raise TypeError(f"{type(value).__name__} is no JSON")


def grammar_of(constraint: Constraint, tokenizer: Tokenizer, bounds: Bounds) -> str:
    """The constraint as llguidance takes it. Raises BadConstraint."""
    grammar = SOURCES[constraint.kind](constraint.value, tokenizer, bounds)
    return begun_after(constraint, grammar, tokenizer) if constraint.after else grammar


def begun_after(constraint: Constraint, grammar: str, tokenizer: Tokenizer) -> str:
    """A grammar that begins when a text has come; or at once, where that need not be."""
    mark, opening = constraint.after, constraint.opening
    special = special_tokens(tokenizer, [mark, opening])
    lead, before = up_to(written(mark, special)), 'lead ("\\n" "\\n"?)?'
    if opening:
        before = f"({written(opening, special)} {before})?"
    # llguidance leaves Lark as it is, and makes JSON of everything else.
    parts = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    first, *others = parts
    rules = f"start: {before} @form\nTEXT: {ANYTHING}\n{lead}"
    return json.dumps(
        {"grammars": [{"name": "led", "lark_grammar": rules}, {**first, "name": "form"}, *others]}
    )


def _json_schema(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    return schema_grammar(value, bounds)


def schema_grammar(value: Any, bounds: Bounds) -> str:
    """The grammar of JSON that a schema describes."""
    schema = json.dumps(checked_schema(value, bounds), allow_nan=False)
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=STYLE)


def _json_object(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    if value is not None:
        raise BadConstraint("json_object takes no value: give a json_schema to say more")
    return schema_grammar(JSON_OBJECT, bounds)


def _regex(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    _check_brackets("regex", _text("regex", value), bounds)
    if (len(value) - len(value.rstrip("\\"))) % 2:
        raise BadConstraint("regex: it ends with a single backslash")
    return llguidance.LLMatcher.grammar_from_regex(value)


def _grammar(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    text = _text("grammar", value)
    _check_brackets("grammar", text, bounds)
    if "::=" in text and len(text) > bounds.gbnf_bytes:
        raise BadConstraint(
            f"grammar: in GBNF it may have {bounds.gbnf_bytes:,} characters, not {len(text):,}: write it in Lark"
        )
    try:
        lark = any_to_lark(text)
    except (GbnfToLarkError, ValueError, IndexError, KeyError, RecursionError) as error:
        raise BadConstraint(f"grammar: it is neither Lark nor GBNF: {error}") from error
    return llguidance.LLMatcher.grammar_from_lark(lark)


def _choice(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise BadConstraint("choice: give a list of one text or more")
    if len(value) > bounds.choices:
        raise BadConstraint(f"choice: there are {len(value)} texts; at most {bounds.choices} are taken")
    for text in value:
        if not isinstance(text, str) or not text:
            raise BadConstraint(f"choice: {text!r} is no text of one character or more")
    return llguidance.LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(quoted, value)))


def _tools(value: Any, tokenizer: Tokenizer, bounds: Bounds) -> str:
    return llguidance.LLMatcher.grammar_from_lark(tool_rules(value, tokenizer, bounds))


def _text(kind: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadConstraint(f"{kind}: give a text of one character or more")
    return value


def _check_brackets(kind: str, text: str, bounds: Bounds) -> None:
    """Brackets nested too deeply would take the parser's stack."""
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth > bounds.depth:
            raise BadConstraint(f"{kind}: brackets are nested more than {bounds.depth} deep")


SOURCES: Mapping[str, Callable[[Any, Tokenizer, Bounds], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "grammar": _grammar,
    "choice": _choice,
    "tools": _tools,
}
