"""The socket that is listened on, and whether it may be."""

import ipaddress
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from maxstack.config import UserError

BACKLOG = 2048
"""Connections that wait to be taken."""


def check_open(host: str, keys: Sequence[str], told: bool) -> None:
    """Refuse to answer other machines without a key, unless `told` explicitly."""
    if keys or told or is_loopback(host):
        return
    raise UserError(
        f"--host {host} answers other machines, and anybody there could ask: give --api-key-file FILE, keep to "
        f"--host 127.0.0.1, or say --allow-no-key where something in front checks who asks"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_tls(cert: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """The two files, if they belong together. Raises UserError where they do not, or one is missing."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("--tls-cert and --tls-key go together: give the certificate and its key, both in PEM")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl's own are OSErrors
        raise UserError(
            f"--tls-cert {cert} and --tls-key {key} are no certificate and key in PEM without a password: {error}"
        ) from error
    return cert, key


def listening(host: str, port: int) -> socket.socket:
    """A socket to which one can connect at once. Raises UserError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise UserError(
            f"--port {port} on {host} cannot be listened on: {error.strerror}; choose another one, or 0 for any"
        ) from error
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Where to ask."""
    return f"{scheme}://{address_of(*sock.getsockname()[:2])}"


def address_of(host: str, port: int) -> str:
    """A host and a port in one."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
