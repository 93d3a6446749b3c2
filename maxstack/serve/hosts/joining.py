"""How the processes that serve together find each other: by `jax.distributed`, and over it to a link of our own."""

import dataclasses
import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

import maxstack
from maxstack.config import RunError, UserError
from maxstack.processes import NAMES
from maxstack.serve.hosts.follower import Follower, found
from maxstack.serve.hosts.leader import Leader, awaited

LETTER_BYTES = 2**13


def gathered(what: Any, environment: Mapping[str, str] = os.environ) -> Leader | Follower | None:
    """This process's place among those that serve together; None for one alone. After `join_processes`.

    The leader's address and a secret go to the others with a sum over all devices. Raises UserError when they were
    asked for different things (`what` is a dataclass), RunError when they do not reach each other.
    """
    if jax.process_count() == 1:
        return None
    if jax.process_index() == 0:
        return _leading(what, environment)
    letter = read(np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(LETTER_BYTES, np.uint8))))
    check_same(letter["what"], told_of(what), jax.process_index())
    secret = bytes.fromhex(letter["secret"])
    return found(letter["addresses"], letter["port"], secret, jax.process_index())


def _leading(what: Any, environment: Mapping[str, str]) -> Leader:
    host = environment.get(NAMES[2], "").rpartition(":")[0].strip("[]")
    with listening(host) as sock:
        secret = secrets.token_bytes(32)
        letter = {
            "addresses": [host] if host else own_addresses(),
            "port": sock.getsockname()[1],
            "secret": secret.hex(),
            "what": told_of(what),
        }
        multihost_utils.broadcast_one_to_all(written(letter))
        return awaited(sock, secret, jax.process_count() - 1)


def listening(host: str) -> socket.socket:
    """A free port at the coordinator's address; where that is none of this machine's own, or unknown, at all."""
    try:
        return socket.create_server((host, 0))
    except OSError:
        return socket.create_server(("", 0))


def own_addresses() -> list[str]:
    """Where this machine may be found by others, IPv4."""
    every = [
        one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET
    ]
    return sorted(every, key=lambda address: address.startswith("127."))


def told_of(what: Any) -> dict[str, str]:
    """What this process was asked to serve, and with what."""
    asked = {name: repr(value) for name, value in dataclasses.asdict(what).items()}
    return {**asked, "maxstack": maxstack.__version__, "jax": jax.__version__}


def check_same(leaders: Mapping[str, str], own: Mapping[str, str], place: int) -> None:
    """Raises UserError naming what this process was asked for differently."""
    names = sorted(leaders.keys() | own.keys())
    differ = [name for name in names if leaders.get(name) != own.get(name)]
    if differ:
        told = "; ".join(f"{name}: {leaders.get(name)} there, {own.get(name)} here" for name in differ)
        raise UserError(f"process {place} was started differently from process 0 ({told}): start all alike")


def written(letter: dict[str, Any]) -> np.ndarray:
    """A letter as bytes of a fixed number."""
    data = json.dumps(letter).encode()
    if len(data) > LETTER_BYTES:
        raise RunError(f"the leader has {len(data)} bytes to say; {LETTER_BYTES} are sent")
    return np.frombuffer(data.ljust(LETTER_BYTES), np.uint8)


def read(data: np.ndarray) -> dict[str, Any]:
    """Its values."""
    return json.loads(data.astype(np.uint8).tobytes())
