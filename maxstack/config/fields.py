"""The fields of a configuration: their types, the values that fit, the docstrings behind them."""

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast


def is_config(value: Any) -> bool:
    """Whether the value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def hints(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass, resolved."""
    return typing.get_type_hints(cls)


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if isinstance(hint, typing.TypeAliasType):
        return members(hint.__value__)
    if typing.get_origin(hint) is typing.Annotated:
        return members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for arg in typing.get_args(hint) for m in members(arg))
    return (hint,)


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value fits a type hint. An int fits a float, a bool no number, NaN nothing; unknown kinds take all."""
    choices = members(hint)
    if len(choices) > 1:
        return any(accepts(choice, value) for choice in choices)
    hint = choices[0]
    if typing.get_origin(hint) is not None:
        return _accepts_generic(typing.get_origin(hint), typing.get_args(hint), value)
    if hint in (Any, object) or not (hint is None or isinstance(hint, type)):
        return True
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, hint)


def _accepts_generic(origin: Any, args: tuple[Any, ...], value: Any) -> bool:
    if origin is Callable:
        return callable(value)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(accepts(args[0], item) for item in value)
        return len(args) == len(value) and all(map(accepts, args, value))
    if origin in (list, Sequence):
        return (
            isinstance(value, origin)
            and not isinstance(value, str)
            and all(accepts(args[0], v) for v in value)
        )
    if origin in (dict, typing.get_origin(typing.Mapping[str, str])):
        return isinstance(value, origin) and all(
            accepts(args[0], k) and accepts(args[1], v) for k, v in value.items()
        )
    return True


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `int | None`, `one of 'gqa', 'mla'`, `tuple[float, float]`."""
    choices = members(hint)
    if len(choices) > 1:
        return " | ".join(type_name(choice) for choice in choices)
    hint = choices[0]
    if typing.get_origin(hint) is Callable:
        return "function"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    if hint is type(None):
        return "None"
    if typing.get_args(hint):
        inner = ", ".join("..." if arg is Ellipsis else type_name(arg) for arg in typing.get_args(hint))
        return f"{getattr(typing.get_origin(hint), '__name__', hint)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def short(value: Any) -> str:
    """A value in an error message."""
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The dataclasses in a field's value, with dotted suffixes: itself (""), members of a tuple (".0") or dict."""
    if is_config(value):
        yield "", value
    elif isinstance(value, tuple | list):
        yield from ((f".{i}{name}", part) for i, item in enumerate(value) for name, part in parts(item))
    elif isinstance(value, dict):
        yield from ((f".{key}{name}", part) for key, item in value.items() for name, part in parts(item))


def wrong_types(config: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each field, however deep, whose value does not fit its annotation."""
    annotations = hints(type(config))
    for field in dataclasses.fields(config):
        hint, value = annotations[field.name], getattr(config, field.name)
        if not accepts(hint, value):
            kind = "not a number" if value != value else type(value).__name__
            yield f"{prefix}{field.name} is {short(value)} ({kind}); expected {type_name(hint)}"
        for name, part in parts(value):
            yield from wrong_types(part, f"{prefix}{field.name}{name}.")


def undocumented(cls: type) -> list[str]:
    """Fields, as `module.Class.field`, of a dataclass and all reachable from its annotations that lack a docstring."""
    missing: list[str] = []
    seen: set[Any] = set()
    queue: list[Any] = [cls]
    while queue:
        hint = queue.pop()
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            queue.extend(inner for inner in typing.get_args(hint) or members(hint) if inner is not hint)
        elif hint not in seen:
            seen.add(hint)
            documented = meanings(hint)
            names = [field.name for field in dataclasses.fields(hint) if field.name not in documented]
            missing += [f"{hint.__module__}.{hint.__qualname__}.{name}" for name in names]
            queue.extend(hints(hint).values())
    return sorted(missing)


def meanings(cls: type) -> dict[str, str]:
    """The docstring that follows each field of a dataclass, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _docstrings(base)
    return found


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # made at run time
        return {}
    found = {}
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
                found[field.target.id] = " ".join(value.value.split())
    return found
