"""Sizes of blocks by chip, type and shape: from the user's table, else the package's, else the kernel's own rule.

A kernel asks `chosen` while it is traced: the answer is a constant of the program, and where no table has a line for
the call nothing has happened but a few lookups in a dictionary. A line is found by kernel, chip, dtype and class of
shape ("attention.xla.forward cpu float32 t2048 s2048 h64 w64"); the last two may be `*`, which is asked for after the
exact ones. The package's table is `tiles.json` beside this file; a user's own is filled by `maxstack bench kernels
--tune` (`user_file` says where it is) and has the same form.

A line is checked by the kernel that asks; one that it refuses, and a file that is no such table, is told of once and
left alone. Sizes change a kernel's speed and memory, never its result beyond rounding.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from maxstack.kernels.dispatch import chip

log = logging.getLogger(__name__)

SWITCH = "MAXSTACK_TILES"
"""Environment variable: the user's table, or nothing for none."""
FORM = "maxstack tiles 1"
"""What a table says it is."""
PACKAGE = Path(__file__).with_name("tiles.json")
Sizes = dict[str, int]
Axes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Request:
    """What a kernel asked, and what a tuner has to know of it."""

    kernel: str
    chip: str
    dtype: str
    shape: str
    """The class: names and sizes."""
    rule: Sizes
    """What the kernel takes where no table says otherwise."""
    axes: Axes
    """Sizes worth trying, by name."""
    fault: Callable[[Sizes], str | None]
    """Why the kernel cannot take such sizes; None: it can."""
    current: Sizes
    """What it was given."""

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.chip} {self.dtype} {self.shape}"

    def lines(self) -> tuple[str, ...]:
        """Keys of lines that serve it, the closest first."""
        return self.key, f"{self.kernel} {self.chip} {self.dtype} *", f"{self.kernel} {self.chip} * *"

    def refused(self, sizes: Any) -> str | None:
        """Why this is no answer; None: it is one."""
        if not isinstance(sizes, dict) or not sizes:
            return "it has no sizes"
        for name, size in sizes.items():
            if name not in self.rule:
                return f"there is no {name!r}; sizes are {', '.join(self.rule)}"
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                return f"{name} is {size!r}; it must be a positive integer"
        return self.fault(self.rule | sizes)


_asked: ContextVar[dict[str, Request] | None] = ContextVar("asked", default=None)
_tried: ContextVar[Mapping[str, Sizes] | None] = ContextVar("tried", default=None)


def chosen(
    kernel: str,
    dtype: Any,
    shape: Mapping[str, int],
    rule: Sizes,
    *,
    axes: Axes,
    fault: Callable[[Sizes], str | None],
) -> Sizes:
    """Sizes for a call of `kernel`: those of `rule`, but for what a table has for this chip, dtype and shape.

    `shape` has the sizes that tell calls apart, lengths by way of `about`. `axes` are sizes that a tuner shall try;
    `fault` says why sizes cannot be taken, whoever proposes them.
    """
    name = f"{jnp.dtype(dtype).name}"
    shape_class = " ".join(f"{letter}{size}" for letter, size in shape.items())
    request = Request(kernel, chip().name, name, shape_class, rule, axes, fault, rule)
    tried = _tried.get()
    sizes = rule | _line(request, user=tried is None) | (tried or {}).get(request.key, {})
    if (asked := _asked.get()) is not None:
        asked[request.key] = replace(request, current=sizes)
    return sizes


def about(length: int) -> int:
    """The power of two that a length counts as: itself or the next larger."""
    return 1 << max(length - 1, 0).bit_length()


def _line(request: Request, *, user: bool) -> Sizes:
    """The first line that serves a request, of the tables in their order; {} for none."""
    file = user_file() if user else None
    for source in (PACKAGE,) if file is None else (file, PACKAGE):
        table = _table(source)
        for key in request.lines():
            if key not in table:
                continue
            sizes: Any = table[key].get("sizes") if isinstance(table[key], dict) else None
            if (reason := request.refused(sizes)) is None:
                return sizes
            _tell(f"{source}: the line {key!r} is left alone: {reason}")
    return {}


@contextlib.contextmanager
def asked() -> Iterator[dict[str, Request]]:
    """The requests of kernels that are traced inside, by key."""
    found: dict[str, Request] = {}
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def trying(sizes: Mapping[str, Sizes]) -> Iterator[None]:
    """Kernels that are traced inside get these sizes, by key; others what the package or their rule says: the user's
    table is left out. jax keeps traces: trace a function made anew."""
    token = _tried.set(sizes)
    try:
        yield
    finally:
        _tried.reset(token)


def user_file() -> Path | None:
    """What MAXSTACK_TILES names (empty: None), else maxstack/tiles.json in $XDG_CACHE_HOME, or in ~/.cache."""
    named = os.environ.get(SWITCH)
    if named is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "maxstack" / "tiles.json"


@functools.cache
def _table(file: Path) -> dict[str, Any]:
    """The lines of a file, read once a process; {} if it is not there, or, which is told, no table."""
    try:
        return read(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _tell(f"{file} is left alone: {error}; remove it, or name another with {SWITCH}")
        return {}


def read(file: Path) -> dict[str, Any]:
    """The lines of a table, by key: `{"sizes": {…}, "source": "…"}`. OSError or ValueError says why there are none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of its characters
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(found, dict) or found.get("form") != FORM or not isinstance(found.get("lines"), dict):
        raise ValueError(f"it is no table of the form {FORM!r}")
    return found["lines"]


def written(lines: Mapping[str, Any]) -> str:
    """The text of a table: a line each."""
    rows = [f"  {json.dumps(key)}: {json.dumps(lines[key], ensure_ascii=False)}" for key in sorted(lines)]
    return f'{{"form": {json.dumps(FORM)}, "lines": {{\n' + ",\n".join(rows) + "\n}}\n"


def forget() -> None:
    """Read tables anew when they are asked for next."""
    _table.cache_clear()
    _tell.cache_clear()


@functools.cache
def _tell(what: str) -> None:
    """Once for each complaint."""
    log.warning("tiles: %s", what)
