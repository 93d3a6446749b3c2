"""The process that leads: it tells the others each call before it makes it itself."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from maxstack.config import RunError
from maxstack.serve.hosts.calls import Calls
from maxstack.serve.hosts.frames import QUIET_S, Kind, Link, LinkLost, Pulse

log = logging.getLogger(__name__)

COME_WITHIN_S = 300.0
"""For followers to come, once they have been invited."""
READY_WITHIN_S = 3600.0
"""For followers to read the model and to compile."""
ADMIT_S = 5.0
"""A stranger may be silent for; the others wait meanwhile."""
GOODBYE_S = 3.0


class Leader:
    """Links to all followers. `tell` may be called by one thread."""

    def __init__(self, links: list[Link]):
        self._links = links
        self._calls: Calls | None = None
        self._ready: list[bytes | None] = [None] * len(links)
        self._changed, self.lost = threading.Condition(), ""
        self._over = False
        self.on_lost: Callable[[str], None] = log.error
        """Told once, by any thread, when there is no going on."""
        self.on_leaving: Callable[[str], None] = log.warning
        """Told when a follower was asked to leave."""
        self._hearing = [
            threading.Thread(target=self._hear, args=(i,), name=f"maxstack-follower-{i + 1}", daemon=True)
            for i in range(len(links))
        ]
        self._pulse = Pulse(links)
        for thread in (*self._hearing, self._pulse):
            thread.start()

    def say_limits(self, values: dict[str, Any]) -> None:
        """The sizes that all compile for. Raises RunError when a follower is gone."""
        try:
            self._say(Kind.LIMITS, data=json.dumps(values).encode())
        except LinkLost as error:
            raise RunError(str(error)) from error

    def wait(self, calls: Calls) -> None:
        """Until all followers have compiled the same. Raises RunError if they do not."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost or all(self._ready), READY_WITHIN_S)
            ready = list(self._ready)
        if self.lost:
            raise RunError(self.lost)
        for place, digest in enumerate(ready, 1):
            if digest is None:
                raise RunError(f"process {place} did not compile its programs in {READY_WITHIN_S:.0f} s")
            if digest != calls.digest:
                raise RunError(
                    f"process {place} has compiled other programs than process 0: start all with the same command, "
                    "the same model files and the same version"
                )
        self._calls = calls

    def tell(self, key: Any, given: Any) -> None:
        """What is to be called next. Raises ValueError, and tells nobody, for arrays that the program does not take;
        LinkLost when a follower is gone."""
        if self._calls is None:
            raise RuntimeError("followers are called before they are ready")
        number, data = self._calls.encoded(key, given)
        if self.lost:
            raise LinkLost(self.lost)
        self._say(Kind.CALL, number, data)

    def end(self, reason: str = "") -> None:
        """No more calls; without a reason this is a good end. Waits a little for followers to hear it."""
        with self._changed:
            if self._over:
                return
            self._over = True
        self._pulse.stop()
        for link in self._links:
            with contextlib.suppress(LinkLost):  # it is gone already
                link.send(Kind.END, data=reason.encode()[:1000])
        until = time.monotonic() + GOODBYE_S
        for thread in self._hearing:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        for link in self._links:
            link.close()

    def _say(self, kind: Kind, number: int = 0, data: bytes = b"") -> None:
        for place, link in enumerate(self._links, 1):
            try:
                link.send(kind, number, data)
            except LinkLost as error:
                self.lose(f"process {place} of those that serve together is gone: {error}")
                raise LinkLost(self.lost) from error

    def _hear(self, at: int) -> None:
        """What one follower says, until the end."""
        try:
            while True:
                kind, _, data = self._links[at].receive()
                if kind == Kind.READY:
                    with self._changed:
                        self._ready[at] = data
                        self._changed.notify_all()
                elif kind == Kind.FAULT:
                    said = data.decode(errors="replace")
                    self.lose(f"process {at + 1} of those that serve together has failed: {said}")
                elif kind == Kind.LEAVING:
                    self.on_leaving(f"process {at + 1} was asked to leave")
                elif kind != Kind.ALIVE:
                    raise LinkLost(f"it said {kind.name}, which only leaders say")
        except LinkLost as error:
            if not self._over:
                self.lose(f"process {at + 1} of those that serve together is gone: {error}")

    def lose(self, why: str) -> None:
        """There is no going on: all are told, once."""
        with self._changed:
            first, self.lost = not self.lost, self.lost or why
            self._changed.notify_all()
        if first:
            log.error("%s; there is no going on: start all of them again", why)
            threading.Thread(target=self.end, args=(why,), name="maxstack-leaving", daemon=True).start()
            self.on_lost(why)


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """What fails inside fails here, and perhaps not where the others are: nobody goes on."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        raise LinkLost(
            f"a step failed in process 0, and what the others have done is not known: {type(error).__name__}: {error}"
        ) from error


def awaited(listening: socket.socket, secret: bytes, followers: int) -> Leader:
    """A leader, once all followers have come. Raises RunError if they do not; who does not know the secret is sent
    away."""
    found: dict[int, Link] = {}
    until = time.monotonic() + COME_WITHIN_S
    try:
        while len(found) < followers:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError
            listening.settimeout(left)
            sock, address = listening.accept()
            link = Link(sock)
            try:
                sock.settimeout(ADMIT_S)
                place = link.admit(secret)
                sock.settimeout(QUIET_S)
            except LinkLost as error:
                log.warning("a connection from %s was refused: %s", address[0], error)
                link.close()
                continue
            if not 0 < place <= followers or place in found:
                raise RunError(f"a process came as number {place}; {followers} follow, each once")
            found[place] = link
    except TimeoutError as error:
        missing = sorted(set(range(1, followers + 1)) - found.keys())
        raise RunError(
            f"processes {missing} did not come to process 0 in {COME_WITHIN_S:.0f} s: see that port "
            f"{listening.getsockname()[1]} of its host can be reached from theirs"
        ) from error
    return Leader([found[place] for place in sorted(found)])
