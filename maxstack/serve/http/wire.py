"""A short way for a stream's chunks, past the layers that have nothing to do with them."""

from typing import Protocol, runtime_checkable

from starlette.types import Scope

EXTENSION = "maxstack.wire"
"""Under this name a server that has one puts it into the scope's extensions."""


@runtime_checkable
class Wire(Protocol):
    """The connection of an answer whose head is sent and whose length is not told beforehand."""

    @property
    def free(self) -> bool:
        """Whether the client takes what comes; while it does not, `send` is the way, which waits for it."""
        ...

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        ...


def wire_of(scope: Scope) -> Wire | None:
    """That of a request; None under a server that has none."""
    return scope.get("extensions", {}).get(EXTENSION)
