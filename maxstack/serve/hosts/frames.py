"""What leader and followers say to each other over TCP: frames of a kind, a number and some bytes.

Nothing in a frame says what is to be made of its bytes: receivers know that from the number, and how many there must
be. Both sides show that they know the same secret before anything else is said. As all that `jax.distributed` does,
what follows is neither encrypted nor signed: it belongs into a network of the cluster's own.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import threading
from enum import IntEnum

HEAD = struct.Struct("<BxxxII")
MOST_BYTES = 2**30
WORDS_BYTES = 2**16
"""Of frames that are not calls."""
NONCE = 32
PROOF = 32
PLACE = struct.Struct("<I")
QUIET_S = 20.0
"""Seconds without a word after which the other side is taken for lost; each says something every fifth of it."""


class Kind(IntEnum):
    """What a frame is."""

    LIMITS = 1
    """Leader: the sizes that all compile for, as JSON."""
    READY = 2
    """Follower: all is compiled; a digest of its programs."""
    CALL = 3
    """Leader: run the program of this number on these arrays."""
    END = 4
    """Leader: no more calls; a reason, if it is a bad one."""
    FAULT = 5
    """Follower: a call has failed, with what."""
    LEAVING = 6
    """Follower: it was asked to leave, so that all should."""
    ALIVE = 7


class LinkLost(Exception):
    """A process of those that serve together is gone, or no longer does as the others do: they end. No RuntimeError:
    an engine goes on after those."""


class Link:
    """Frames over a socket. One thread receives, any may send."""

    def __init__(self, sock: socket.socket):
        self._sock, self._lock = sock, threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(QUIET_S)

    def send(self, kind: Kind, number: int = 0, data: bytes = b"") -> None:
        """Raises LinkLost."""
        try:
            with self._lock:
                self._sock.sendall(HEAD.pack(kind, number, len(data)) + data)
        except OSError as error:
            self.close()  # a part of the frame may be on its way, and nobody may go on behind it
            raise LinkLost(f"the link is broken: {error}") from error

    def receive(self) -> tuple[Kind, int, bytes]:
        """Raises LinkLost for the end of the link, and for what is no frame."""
        kind, number, size = HEAD.unpack(self._read(HEAD.size))
        if kind not in Kind.__members__.values():
            raise LinkLost(f"a frame of kind {kind} came, which nobody sends")
        most = MOST_BYTES if kind == Kind.CALL else WORDS_BYTES
        if size > most:
            raise LinkLost(f"a frame of {size} bytes came; {Kind(kind).name} has at most {most}")
        return Kind(kind), number, self._read(size)

    def _read(self, size: int) -> bytes:
        data, have = bytearray(size), 0
        view = memoryview(data)
        try:
            while have < size:
                count = self._sock.recv_into(view[have:])
                if not count:
                    raise LinkLost("the link was closed")
                have += count
        except TimeoutError as error:
            raise LinkLost(f"nothing was heard for {QUIET_S:.0f} s") from error
        except OSError as error:
            raise LinkLost(f"the link is broken: {error}") from error
        return bytes(data)

    def admit(self, secret: bytes) -> int:
        """The leader's side of the proof: which process this is. Raises LinkLost for one that does not know the
        secret."""
        nonce = secrets.token_bytes(NONCE)
        self._raw(nonce)
        said = self._read(PLACE.size + NONCE + PROOF)
        place, theirs, proof = said[: PLACE.size], said[PLACE.size : -PROOF], said[-PROOF:]
        if not hmac.compare_digest(proof, proved(secret, b"follower", nonce, place)):
            raise LinkLost("somebody came who does not know the secret of these processes")
        self._raw(proved(secret, b"leader", theirs, place))
        return PLACE.unpack(place)[0]

    def introduce(self, secret: bytes, place: int) -> None:
        """The follower's side. Raises LinkLost for a leader that does not know the secret."""
        own, nonce = PLACE.pack(place), secrets.token_bytes(NONCE)
        proof = proved(secret, b"follower", self._read(NONCE), own)
        self._raw(own + nonce + proof)
        if not hmac.compare_digest(self._read(PROOF), proved(secret, b"leader", nonce, own)):
            raise LinkLost("whoever listens there does not know the secret of these processes")

    def _raw(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkLost(f"the link is broken: {error}") from error

    def close(self) -> None:
        """Both ways, so that a thread that receives wakes up."""
        with contextlib.suppress(OSError):  # it was closed from the other side
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def proved(secret: bytes, who: bytes, nonce: bytes, place: bytes) -> bytes:
    """What only somebody who knows the secret can say."""
    return hmac.digest(secret, who + nonce + place, "sha256")


class Pulse(threading.Thread):
    """Says on some links that this process is there, until stopped."""

    def __init__(self, links: list[Link]):
        super().__init__(name="maxstack-pulse", daemon=True)
        self._links, self._over = links, threading.Event()

    def run(self) -> None:
        """Every fifth of the time after which silence counts."""
        while not self._over.wait(QUIET_S / 5):
            for link in self._links:
                with contextlib.suppress(LinkLost):  # whoever receives on it says so
                    link.send(Kind.ALIVE)

    def stop(self) -> None:
        """No more."""
        self._over.set()
