"""The sandbox for chat templates: jinja2's immutable one, with what transformers adds for templates, and with caps.

A template is foreign code. It sees plain data only, and each of its steps (loops, operators, calls, filters, output) is
charged to a budget before it can become large. There are no threads or signals: a step is either small or refused.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_environment
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from maxstack.data.chat.budget import MOST_TEXT, Exceeded, budget, counted
from maxstack.data.chat.instrument import Instrument, instrumented

# Filters that make texts of any length from small arguments, or run slow patterns; no known chat template uses them.
_LEFT_OUT = (
    "batch", "center", "filesizeformat", "pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_DEEP = (
    "in",
    "eq",
    "==",
    "equalto",
    "ne",
    "!=",
    "lt",
    "<",
    "le",
    "<=",
    "gt",
    ">",
    "ge",
    ">=",
    "lessthan",
    "greaterthan",
)
_WIDE = re.compile(r"[0-9]{3}|\*|\{[^}]*\{")
"""In a format: a width of 100 and more, or one that is given by an argument."""
_PADDED = ("center", "ljust", "rjust", "zfill", "expandtabs")


class Refusal(TemplateError):
    """What a template says with raise_exception."""


class TemplateNamespace(Namespace):
    """jinja2's namespace() without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # noqa: N805, RUF100
        own, *given = args
        entries = dict(*given, **kwargs)
        for name in entries:
            _plain_name(name)
        Namespace.__init__(own, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # what is in it may be endless on paper


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have {name!r}: it begins with an underscore")


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, now: Callable[[], datetime], extensions: Iterable[type[Extension]] = ()):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, Instrument, *extensions],
            finalize=_output,
        )
        self.concat = _concat  # pyrefly: ignore[bad-assignment]
        kept = {name: made for name, made in self.filters.items() if name not in _LEFT_OUT}
        kept |= {"tojson": _to_json, "replace": _replace, "indent": _indent, "format": _format}
        kept |= {"join": _join, "sum": _sum}
        self.filters = {name: _charged(made) for name, made in kept.items()}
        self.tests = {name: _charged(made, deep=name in _DEEP) for name, made in self.tests.items()}
        allowed: dict[str, Any] = {
            "range": _range, "dict": _dict, "namespace": TemplateNamespace,
            "raise_exception": _raise_exception, "strftime_now": _clock(now),
        }  # fmt: skip
        self.globals = allowed

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(instrumented(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operator's value, or Exceeded where it would be large."""
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            budget().plan(len(left) + len(right))
        if operator == "*":
            _times(left, right)
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise Exceeded(f"it takes a power of {right!r}")
        if operator == "%" and isinstance(left, str):
            _narrow(left)
        return budget().made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox's, charged."""
        budget().charge()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As the sandbox's, charged: a slice is a copy."""
        value = super().getitem(obj, argument)
        if isinstance(argument, slice):
            return budget().made(value)
        budget().charge()
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The guarded form of str.format, for narrow fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _narrow(value.__self__)
        return wrapped

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As the sandbox's; the methods of str that make long texts are asked first."""
        own = getattr(__obj, "__self__", None)
        if isinstance(own, Instrument):
            return __obj(*args)
        if isinstance(own, (int, float, bytes)):
            raise Exceeded(f"it calls a method of {own!r:.40}")
        if isinstance(own, str):
            _before_method(own, getattr(__obj, "__name__", ""), args, kwargs)
        budget().charge()
        return budget().made(super().call(__context, __obj, *args, **kwargs))


def _charged(function: Callable[..., Any], deep: bool = False) -> Callable[..., Any]:
    """A filter or test that is counted; jinja2's marks on it (what it wants passed) are kept.

    `deep`: it compares, so that its arguments count in full.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        own = budget()
        for value in args:
            if deep:
                own.made(value)
            elif isinstance(value, (str, list, tuple, dict)):
                own.charge(len(value))
        return own.made(function(*args, **kwargs))

    run.__dict__.update(getattr(function, "__dict__", {}))  # builtins have none
    return run


def _before_method(text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if method == "replace":
        _replaced(text, *(value for value in (*args, *kwargs.values()) if isinstance(value, str)))
    elif method == "join" and args:
        parts = args[0] if isinstance(args[0], (list, tuple, dict, str)) else ()
        budget().plan(len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, str)))
    elif method == "translate":
        raise Exceeded("it calls str.translate")
    elif method in _PADDED:
        for width in (*args, *kwargs.values()):
            if isinstance(width, int):
                budget().plan(abs(width) * (1 + text.count("\t")))
    budget().charge(len(text))


def _times(left: Any, right: Any) -> None:
    if isinstance(left, int):
        left, right = right, left
    if isinstance(right, int) and isinstance(left, (str, list, tuple)):
        budget().plan(len(left) * max(right, 0))


def _replaced(text: str, old: str = "", new: str = "", *_: str) -> None:
    found = text.count(old) if len(new) > len(old) else 0
    budget().plan(len(text) + found * (len(new) - len(old)))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    _replaced(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


@pass_environment
def _join(
    environment: ChatSandbox, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """jinja2's filter, for texts that stay small."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda one: one
    parts = [str(get(one)) for one in counted(value)]
    budget().plan(len(str(d)) * len(parts) + sum(map(len, parts)))
    return str(d).join(parts)


@pass_environment
def _sum(
    environment: ChatSandbox, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    """jinja2's filter, of numbers."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda one: one
    numbers = [get(one) for one in counted(iterable)]
    if not all(isinstance(one, (int, float)) for one in (start, *numbers)):
        raise TypeError("sum adds numbers only")
    return sum(numbers, start)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja2's filter, for texts that stay small."""
    space = width if isinstance(width, str) else " " * min(width, 100)
    budget().plan(len(text) + len(space) * (text.count("\n") + 2))
    lines = f"{text}\n".splitlines() if not blank else f"{text}\n".split("\n")
    rest = [space + line if line or blank else line for line in lines[1:]]
    done = "\n".join([lines[0], *rest]) if lines else ""
    return space + done if first else done


def _narrow(text: str) -> None:
    if _WIDE.search(text):
        raise Exceeded(f"its format {text[:40]!r} may make fields of any width")


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes positional or named values, not both")
    _narrow(str(text))
    return str(text) % (kwargs or args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers': no HTML escapes."""
    if isinstance(indent, (int, str)) and not 0 <= (indent if isinstance(indent, int) else len(indent)) <= 16:
        raise Exceeded(f"it indents JSON by {indent}")
    if separators is not None and sum(map(len, separators)) > 16:
        raise Exceeded("it separates JSON with long texts")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _concat(parts: Iterable[str]) -> str:
    whole = list(parts)
    budget().plan(sum(map(len, whole)))
    return "".join(whole)


def _output(value: Any) -> Any:
    """What is about to be written as text."""
    budget().made(value)
    return value


def _range(*bounds: int) -> range:
    made = range(*bounds)
    step = abs(made.step)
    size = max(0, (abs(made.stop - made.start) + step - 1) // step)  # len() has a limit of its own
    if size > MOST_TEXT // 16:
        raise Exceeded(f"it asks for a range of {size} numbers")
    return made


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:2000])


def _clock(now: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > 200 or re.search(r"[0-9]{2}", form):
            raise Exceeded(f"it asks for the date as {form[:40]!r}")
        return now().strftime(form)

    return strftime_now
