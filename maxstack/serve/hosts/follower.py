"""A process that follows: it makes each call that the leader tells it of, in the same order."""

import json
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from maxstack.config import RunError
from maxstack.serve.hosts.calls import Calls
from maxstack.serve.hosts.frames import Kind, Link, LinkLost, Pulse

log = logging.getLogger(__name__)

CONNECT_S = 10.0


class Follower:
    """The link to the leader. `follow` belongs to one thread."""

    def __init__(self, link: Link):
        self._link, self._pulse = link, Pulse([link])
        self._pulse.start()

    def limits(self) -> dict[str, Any]:
        """The sizes that all compile for; waits for them. Raises LinkLost."""
        data = self._next(Kind.LIMITS)[1]
        values = json.loads(data)
        if not isinstance(values, dict):
            raise LinkLost(f"the leader's limits are no object but {type(values).__name__}")
        return values

    def follow(self, calls: Calls, call: Callable[[Any, Any], None]) -> str:
        """Say that all is ready, then `call` what the leader calls, until it ends; why it did, if not well. Whatever
        fails here ends all of them, as this process no longer has what the leader thinks."""
        self._link.send(Kind.READY, data=calls.digest)
        while True:
            kind, number, data = self._next(Kind.CALL, Kind.END)
            if kind == Kind.END:
                return data.decode(errors="replace")
            key, given = calls.decoded(number, data)
            call(key, given)

    def fault(self, what: str) -> None:
        """Tell the leader that this process cannot go on."""
        self._try(Kind.FAULT, what.encode()[:1000])

    def leaving(self) -> None:
        """Tell the leader that this process was asked to leave. Any thread."""
        self._try(Kind.LEAVING)

    def close(self) -> None:
        """Let go of the link."""
        self._pulse.stop()
        self._link.close()

    def _try(self, kind: Kind, data: bytes = b"") -> None:
        try:
            self._link.send(kind, data=data)
        except LinkLost as error:
            log.warning("the leader cannot be told %s: %s", kind.name, error)

    def _next(self, *wanted: Kind) -> tuple[Any, ...]:
        """The next frame but for signs of life; of one kind its number and bytes."""
        while True:
            kind, number, data = self._link.receive()
            if kind == Kind.ALIVE:
                continue
            if kind == Kind.END and kind not in wanted:
                raise LinkLost(f"the leader has ended: {data.decode(errors='replace') or 'it was asked to'}")
            if kind not in wanted:
                raise LinkLost(f"the leader said {kind.name} instead of {wanted[0].name}")
            return (number, data) if len(wanted) == 1 else (kind, number, data)


def found(addresses: Sequence[str], port: int, secret: bytes, place: int) -> Follower:
    """A follower, at the first of the leader's addresses where somebody knows the secret. RunError at none."""
    faults = []
    for address in addresses:
        try:
            link = Link(socket.create_connection((address, port), CONNECT_S))
        except OSError as error:
            faults.append(f"{address}: {error}")
            continue
        try:
            link.introduce(secret, place)
            return Follower(link)
        except LinkLost as error:
            link.close()
            faults.append(f"{address}: {error}")
    raise RunError(f"process 0 was not reached at port {port}: {'; '.join(faults)}")
