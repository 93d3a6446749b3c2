"""Run files: Python with one function `config()`, read, and written for a resolved run."""

import ast
import dataclasses
import difflib
import enum
import hashlib
import importlib.abc
import importlib.util
import inspect
import math
import os
import sys
import traceback
import types
from pathlib import Path, PurePath
from typing import Any

from maxstack.config.errors import UserError
from maxstack.config.fields import is_config, short, wrong_types
from maxstack.config.files import write_atomically

_WIDTH = 110  # of a line in a written run file


class _RunFile(importlib.abc.SourceLoader):
    """Source of a run file. No byte code is kept: its key, time and size, misses two edits within a second."""

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str | bytes) -> bytes:
        return Path(os.fsdecode(path)).read_bytes()


def load_run(path: str | Path, expected: type | None = None) -> Any:
    """The dataclass that `config()` of the run file returns, its field types checked.

    Raises UserError, naming the file and line, when there is no such file or no `config()`, the file does not parse or
    raises, or the result is no dataclass (no `expected`, when given) or has a field of a wrong type.
    """
    path = Path(path)
    module = _import_run_file(path)
    function = getattr(module, "config", None)
    if not inspect.isfunction(function):
        raise UserError(
            f"{path}: no function config(); a run file defines one, without parameters, returning the run"
        )
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if required:
        raise UserError(f"{path}: config() is called without arguments, but requires {', '.join(required)}")
    config = _run_user_code(path, function)
    if not is_config(config):
        raise UserError(
            f"{path}: config() returned {short(config)}, a {type(config).__name__}; expected a dataclass"
        )
    if expected is not None and not isinstance(config, expected):
        raise UserError(
            f"{path}: config() returned a {type(config).__name__}; expected a {expected.__name__}"
        )
    wrong = next(wrong_types(config), None)
    if wrong:
        raise UserError(f"{path}: {wrong}")
    return config


def _import_run_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        files = sorted(p.name for p in folder.glob("*.py"))
        near = files if path.is_dir() else difflib.get_close_matches(path.name, files, n=3) or files
        hint = (
            f"; in that folder there is {', '.join(near[:8])}" if near else "; that folder holds no .py file"
        )
        what = "a folder, not a run file" if path.is_dir() else "no such run file"
        raise UserError(f"{path}: {what}{hint}")
    path = path.resolve()
    name = f"maxstack_run_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_loader(name, _RunFile(path))
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look up a class's module there
    _run_user_code(path, spec.loader.exec_module, module)
    return module


def _run_user_code(path: Path, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SyntaxError as error:
        where = f"{error.filename or path}:{error.lineno}" if error.lineno else f"{path}: not Python"
        text = f": {error.text.strip()}" if error.text else ""
        raise UserError(f"{where}: {error.msg}{text}") from error
    except (
        Exception,
        SystemExit,
    ) as error:  # the user's code may raise anything; all of it is the user's to see, with its line
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
        where = f"{path}:{frames[-1].lineno}" if frames else str(path)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: {kind}{error}") from error


def write_run(config: Any, path: str | Path) -> Path:
    """Writes a run file with every field explicit, which `load_run` reads back as an equal object. Atomic.

    Raises UserError for a value that has no spelling in Python: a lambda, or a class defined in a function or in a run
    file itself (put it in a module of its own).
    """
    path = Path(path)
    text = run_text(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def run_text(config: Any) -> str:
    """What `write_run` writes."""
    writer = _Writer()
    body = writer.spell(config, type(config).__name__, indent=4, used=len("    return "))
    lines = [
        '"""The resolved run, every field explicit. Runs again as it is: maxstack train THIS_FILE."""',
        "",
    ]
    lines += writer.imports()
    text = "\n".join([*lines, "", "", "def config():", f"    return {body}", ""])
    ast.parse(text)
    return text


class _Writer:
    """Spells values as Python expressions in the form that `ruff format` leaves alone, and collects their imports."""

    def __init__(self) -> None:
        self._named: dict[str, str] = {}  # name in the file → module it is imported from

    def imports(self) -> list[str]:
        by_module: dict[str, list[str]] = {}
        for local, module in self._named.items():
            by_module.setdefault(module.partition(":")[0], []).append(
                local if module.endswith(f":{local}") else f"{module.partition(':')[2]} as {local}"
            )
        return [
            f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(by_module.items())
        ]

    def spell(self, value: Any, place: str, indent: int, used: int) -> str:
        """`used`: characters before and after the value on its line, which decide whether it fits."""
        opening, items, closing = self._items(value, place)
        if items is None:
            return opening
        flat = [prefix + self.spell(item, where, 0, -10_000) for prefix, item, where in items]
        line = opening + ", ".join(flat) + ("," if opening == "(" and len(flat) == 1 else "") + closing
        if used + len(line) <= _WIDTH or not items:
            return line
        pad = " " * (indent + 4)
        inner = [
            f"{pad}{prefix}{self.spell(item, where, indent + 4, indent + 5 + len(prefix))},"
            for prefix, item, where in items
        ]
        return "\n".join([opening, *inner, " " * indent + closing])

    def _items(self, value: Any, place: str) -> tuple[str, list[tuple[str, Any, str]] | None, str]:
        """Opening, (prefix, value, place) of each item, closing; for an atom its text and None."""
        if is_config(value):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            items = [(f"{name}=", getattr(value, name), f"{place}.{name}") for name in names]
            return f"{self._name(type(value), place)}(", items, ")"
        if type(value) in (tuple, list):
            opening, closing = "()" if isinstance(value, tuple) else "[]"
            return opening, [("", item, f"{place}.{i}") for i, item in enumerate(value)], closing
        if type(value) is dict:
            keys = [(self.spell(key, place, 0, -10_000), key) for key in value]
            return "{", [(f"{text}: ", value[key], f"{place}.{key}") for text, key in keys], "}"
        return self._atom(value, place), None, ""

    def _atom(self, value: Any, place: str) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, enum.Enum):
            return f"{self._name(type(value), place)}.{value.name}"
        if isinstance(value, PurePath):
            return f"{self._name(Path, place)}({_quoted(str(value))})"
        if type(value) is str:
            return _quoted(value)
        if value is None or type(value) in (bool, int, float, bytes):
            return repr(value)
        if isinstance(value, type) or inspect.isfunction(value):
            return self._name(value, place)
        raise UserError(f"{place}: {short(value)}, a {type(value).__name__}, cannot be written in a run file")

    def _name(self, thing: Any, place: str) -> str:
        """The name by which the file calls a class or function, imported from its module."""
        module, name = ("pathlib", "Path") if thing is Path else (thing.__module__, thing.__qualname__)
        if module == "builtins":
            return name
        if not name.isidentifier() or module == "__main__" or module.startswith("maxstack_run_"):
            raise UserError(
                f"{place}: {name} of {module} cannot be imported by name; define it at the top of a module"
            )
        local, count = name, 1
        while self._named.setdefault(local, f"{module}:{name}") != f"{module}:{name}":
            count += 1
            local = f"{name}{count}"
        return local


def _quoted(text: str) -> str:
    """A string literal with double quotes unless that costs escapes, as `ruff format` has it."""
    single = repr(text)
    if single.startswith('"') or '"' in text:
        return single
    return '"' + single[1:-1] + '"'
