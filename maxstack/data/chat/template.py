"""A chat template: compiled once, rendered within its budget, with or without marks."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2

from maxstack.config import UserError
from maxstack.data.chat.budget import MOST_TEMPLATE, MOST_TEXT, Budget, Exceeded, current, size_of
from maxstack.data.chat.instrument import writing
from maxstack.data.chat.marks import Marked, Marks
from maxstack.data.chat.sandbox import ChatSandbox, Refusal
from maxstack.data.tokenizer import well_formed

# What a template's own code can raise, apart from its refusals.
_FAULTS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class ChatTemplate:
    """The jinja text of a chat template, ready to render.

    Raises UserError for a template that is too long or is not jinja; `where` is what to call it.
    """

    def __init__(
        self, source: str, *, where: str = "the chat template", now: Callable[[], datetime] = datetime.now
    ):
        if not isinstance(source, str):
            raise UserError(f"{where} is {type(source).__name__}, not text")
        if len(source) > MOST_TEMPLATE:
            raise UserError(f"{where} has {len(source):,} characters; at most {MOST_TEMPLATE:,} are read")
        self.source, self.where = source, where
        with _within(where), _own_faults(where, "is not a jinja template that can be used"):
            self._compiled = ChatSandbox(now).from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `messages` and what else the template knows.

        Raises UserError for what the template refuses, for a fault in it, and where it takes too much time or memory.
        """
        with _within(self.where), _own_faults(self.where, "fails on these messages"):
            given = size_of(list(variables.values()))
            pieces: list[str] = []
            size = given
            for piece in self._compiled.root_render_func(self._compiled.new_context(dict(variables))):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_TEXT + given:
                    raise Exceeded(f"it writes more than {MOST_TEXT:,} characters")
            return "".join(pieces)

    def marked(self, variables: Mapping[str, Any], plain: str) -> Marked:
        """The rendering `plain` again, with the spans of its messages.

        Raises UserError where the marks would change the text: then nothing can be said of the spans.
        """
        marks = Marks(variables["messages"], plain)
        token = writing.set(marks)
        try:
            found = marks.read(self.render(variables))
        finally:
            writing.reset(token)
        if found.text != plain:
            raise UserError(
                f"{self.where} works on the text it has written, so that the parts of the messages cannot be told "
                "apart; put {% generation %} and {% endgeneration %} around what the assistant says in it"
            )
        return found

    @property
    def reads_reasoning(self) -> bool:
        """Whether it looks for the reasoning of a message."""
        return bool(re.search(r"\breasoning_content\b|\.thinking\b|[\"']thinking[\"']", self.source))


@contextmanager
def _within(where: str):
    token = current.set(Budget())
    try:
        yield
    except Exceeded as error:
        raise UserError(f"{where} was stopped: {error}") from None
    except RecursionError:
        raise UserError(
            f"{where} was stopped: it is nested too deeply, or calls itself without end"
        ) from None
    finally:
        current.reset(token)


@contextmanager
def _own_faults(where: str, how: str):
    try:
        yield
    except (UserError, RecursionError):
        raise
    except Refusal as error:
        raise UserError(f"{where} refuses these messages: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where} {how}: line {error.lineno}: {error.message}") from error
    except _FAULTS as error:
        line = _line(error.__traceback__)
        said = str(error) or type(error).__name__
        raise UserError(f"{where} {how}: {f'line {line}: ' if line else ''}{said[:500]}") from error


def _line(trace: TracebackType | None) -> int | None:
    """The template's line at which a fault came up."""
    line = None
    while trace is not None:
        debug = trace.tb_frame.f_globals.get("debug_info")
        if trace.tb_frame.f_code.co_filename == "<template>" and isinstance(debug, str):
            pairs = (pair.split("=") for pair in debug.split("&") if "=" in pair)
            line = max((int(own) for own, code in pairs if int(code) <= trace.tb_lineno), default=None)
        trace = trace.tb_next
    return line


def plain_data(value: Any, where: str) -> Any:
    """A copy of JSON data, which is all that a template is shown. Raises UserError for anything else."""
    try:
        return json.loads(well_formed(json.dumps(value, ensure_ascii=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not plain JSON data: {error}") from error


def texts_of(values: Sequence[Any]) -> list[str]:
    """All texts in plain data, keys included."""
    found: list[str] = []
    waiting = list(values)
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            waiting += one
    return found
