"""What may be asked of an answer's form, and how much of it."""

import dataclasses
from typing import Any

from maxstack.config import UserError


class BadConstraint(UserError):
    """The constraint cannot be used: it is malformed, too large, or asks for what there is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much one constraint may take. What goes past it is refused, never tried."""

    source_bytes: int = 256 << 10
    """Of schema, expression, grammar or choices, as JSON or text."""
    gbnf_bytes: int = 16 << 10
    """Of a grammar in GBNF: translating it takes time with the square of its rules."""
    depth: int = 64
    """Nesting: of a schema's objects and lists, of an expression's or grammar's brackets."""
    choices: int = 4096
    tools: int = 128
    seconds: float = 10.0
    """For compiling one."""
    start_fuel: int = 1_000_000
    """For the first states of the lexer; about 50,000 a millisecond."""
    step_fuel: int = 200_000
    """For the lexer in one step; about 14,000 a millisecond."""
    step_items: int = 50_000
    """For the parser in one step; about 20,000 a millisecond."""
    states: int = 50_000
    """Of the lexer, 1 to 2 kB each."""
    symbols: int = 200_000
    """In the rules of the grammar."""
    kept: int = 64
    """Compiled ones that are kept for the next request."""
    step_s: float = 0.03
    """For one step, when it is compiled."""
    mask_grace_s: float = 0.5
    """Seconds that an answer's masks may take in all, besides those for each token."""
    mask_token_s: float = 0.002


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The form of an answer.

    | kind | value |
    |---|---|
    | "json_schema" | the schema: a dict, True, or its text |
    | "json_object" | None: any JSON object |
    | "regex" | an expression that the whole answer matches |
    | "grammar" | Lark as llguidance reads it, or GBNF |
    | "choice" | texts, one of which is the answer |
    | "tools" | `ToolCalls`: calls of functions as the model's own template writes them |
    """

    kind: str
    value: Any = None
    after: str = ""
    """The form begins after this text, "</think>" say, and up to there the answer is free. "" for from the start."""
    opening: str = ""
    """With `after`: only an answer that begins with this text, "<think>" say, is free up to there; any other has the
    form from its start. "" where what comes first is open already."""
