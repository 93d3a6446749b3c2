"""Adapters by name, loaded and unloaded while the server answers.

Each has a place in the room that programs were compiled for. `load` reads a folder in the caller's thread; the engine's
thread puts the factors in their place between two plans. `unload` takes the name away at once: requests that use the
adapter go on with it, and its place is free when the last of them is over.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.models.adapters import Adapter, AdapterSlots
from maxstack.models.peft import read_peft
from maxstack.models.transformer import TransformerConfig


@dataclass
class Held:
    """An adapter that is there. `number` is what the device knows it by, from 1."""

    name: str
    number: int
    salt: str
    """What cached pages of its requests have in common: a name that is loaded again is another adapter."""
    users: int = 0
    loading: bool = False
    leaving: bool = False


class Adapters:
    """The adapters of an engine. Its methods may be called from any thread; `load` blocks until the adapter is there.

    `put` has the engine's thread put factors in a place.
    """

    def __init__(
        self, slots: AdapterSlots | None, config: TransformerConfig, names: Mapping[tuple[int, int], Any],
        put: Callable[[int, Adapter], "Future[None]"],
    ):  # fmt: skip
        self.slots, self._config, self._names, self._put = slots, config, names, put
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._places: dict[int, Held] = {}
        self._loaded = 0

    def names(self) -> list[str]:
        """Those that requests may ask for, in the order in which they were loaded."""
        with self._lock:
            return list(self._held)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter of PEFT. Raises UserError for a name or a folder that will not do, or when there is no room;
        nothing has changed then."""
        held = self._take_place(name)
        try:
            adapter = read_peft(Path(folder), self._config, self._names, self.rank)
            self._put(held.number - 1, adapter).result()
        except BaseException:
            with self._lock:
                del self._places[held.number]
            raise
        with self._lock:
            held.loading = False
            self._held[name] = held

    def unload(self, name: str) -> None:
        """Take an adapter away: from now on nobody can ask for it. Raises UserError where there is none."""
        with self._lock:
            held = self._held.pop(name, None)
            if held is None:
                raise UserError(f"no adapter {name!r}: {self._known()}")
            held.leaving = True
            self._free(held)

    def take(self, name: str) -> Held:
        """For a request: the adapter keeps its place until `release`. Raises UserError where there is none."""
        with self._lock:
            if name not in self._held:
                raise UserError(f"no adapter {name!r}: {self._known()}")
            held = self._held[name]
            held.users += 1
            return held

    def release(self, held: Held) -> None:
        """The request is over."""
        with self._lock:
            held.users -= 1
            self._free(held)

    @property
    def rank(self) -> int:
        """The highest that there is room for."""
        return 0 if self.slots is None else self.slots.rank

    def _take_place(self, name: str) -> Held:
        if self.slots is None:
            raise UserError("this engine has no room for adapters: start it with adapters=AdapterSlots(...)")
        if not name:
            raise UserError("an adapter needs a name")
        with self._lock:
            if name in self._held or any(h.name == name and h.loading for h in self._places.values()):
                raise UserError(f"adapter {name!r} is there already: unload it first, or take another name")
            free = [n for n in range(1, self.slots.count + 1) if n not in self._places]
            if not free:
                waiting = [held.name for held in self._places.values() if held.leaving]
                also = (
                    f"; {', '.join(waiting)} is still used by requests that are not over" if waiting else ""
                )
                raise UserError(
                    f"all {self.slots.count} places for adapters are taken ({self._known()}){also}"
                )
            self._loaded += 1
            held = Held(name, free[0], f"{name}#{self._loaded}", loading=True)
            self._places[held.number] = held
            return held

    def _free(self, held: Held) -> None:
        if held.leaving and not held.users and self._places.get(held.number) is held:
            del self._places[held.number]

    def _known(self) -> str:
        return f"there are {', '.join(self._held)}" if self._held else "there are none"
