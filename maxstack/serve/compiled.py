"""The closed table of compiled programs, and a count of whatever is compiled besides."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from maxstack.models.compiling import lies, reading_weights
from maxstack.sharding import on_mesh

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What jax.monitoring says whenever a program is compiled, or read from the cache of compiled ones."""


class Compiled:
    """Programs by name and shape. A call with another shape is an error, never a compilation."""

    def __init__(self, mesh: Mesh | None = None):
        """On a `mesh` every program runs on all of it."""
        self._mesh = mesh
        self._wanted: dict[Any, tuple[Any, tuple]] = {}
        self._compiled: dict[Any, Any] = {}
        self.shapes: dict[Any, tuple] = {}
        """Of each program's arguments."""

    def add(
        self, key: Any, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
    ) -> None:
        """Want `function` compiled for (trees of) arrays or shapes like `arguments`."""
        self.shapes[key] = jax.tree.map(shape_of, arguments)
        self._wanted[key] = jax.jit(function, donate_argnums=donate), self.shapes[key]

    def gives(self, key: Any) -> Any:
        """The shapes of what a wanted program returns."""
        function, shapes = self._wanted[key]
        with on_mesh(self._mesh):
            return function.eval_shape(*shapes)

    def compile(self, threads: int | None = None, told: Callable[[int, int], None] | None = None) -> None:
        """Compile what is wanted, several at once: tracing takes turns, the compiler does not. `told` hears of each
        one that is done, and how many there are."""
        done = itertools.count(1)

        def one(each: tuple[Any, tuple[Any, tuple]]) -> tuple[Any, Any]:
            key, (function, shapes) = each
            with on_mesh(self._mesh):
                compiled = function.lower(*shapes).compile(reading_weights())
            if told is not None:
                told(next(done), len(self._wanted))
            return key, compiled

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            self._compiled |= dict(pool.map(one, self._wanted.items()))
        self._wanted.clear()

    def __getitem__(self, key: Any) -> Any:
        return self._compiled[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._compiled)

    def __len__(self) -> int:
        return len(self._compiled)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape that a program is compiled for; where an array lies, it stays."""
    sharding = lies(leaf) if isinstance(leaf, jax.Array) and leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Compilations:
    """Counts what one thread compiles."""

    def __init__(self):
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count those of the thread that enters."""
        mine = threading.get_ident()

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == COMPILED and threading.get_ident() == mine:
                self.count += 1

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
