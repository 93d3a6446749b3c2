"""Tensors under the names that a family's table has for them, where a file calls them otherwise."""

import re
from collections.abc import Sequence
from typing import Self

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.source import TensorInfo, TensorSource


def respelled(source: TensorSource, spellings: Sequence[tuple[str, str]]) -> TensorSource:
    """`source` with each name that a pattern matches in full written as its replacement says (as of re.sub).

    Raises UserError when two tensors get one name.
    """
    return Respelled(source, spellings) if spellings else source


class Respelled:
    """A TensorSource under other names."""

    def __init__(self, source: TensorSource, spellings: Sequence[tuple[str, str]]):
        self.source, self.where = source, source.where
        self.own: dict[str, str] = {}
        for name in source.names():
            new = spelled(name, spellings)
            if new in self.own:
                raise UserError(f"{source.where}: {self.own[new]} and {name} are two names of one tensor")
            self.own[new] = name

    def names(self) -> tuple[str, ...]:
        return tuple(self.own)

    def info(self, name: str) -> TensorInfo:
        return self.source.info(self.own.get(name, name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.source.read(self.own.get(name, name), start, stop)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def spelled(name: str, spellings: Sequence[tuple[str, str]]) -> str:
    """The name as the first pattern that matches it writes it."""
    for pattern, replacement in spellings:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name
