"""HTTP by hand, for what no client library would send."""

import json
import socket
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@contextmanager
def connected(url: str):
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as line:
        yield line


def head(method: str, path: str, *headers: str, close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *headers, *(["Connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def read(line: socket.socket) -> Answer:
    """All until the server closes the connection."""
    data = b""
    while part := line.recv(65536):
        data += part
    start, _, body = data.partition(b"\r\n\r\n")
    first, *rest = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answer(int(first.split()[1]), headers, body)


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        n = int(size, 16)
        whole, body = whole + rest[:n], rest[n + 2 :]
        if not n:
            break
    return whole


def ask(url: str, data: bytes, *headers: str, path: str = "/v1/completions", method: str = "POST") -> Answer:
    own = (
        ["Content-Type: application/json"]
        if not any(h.lower().startswith("content-type") for h in headers)
        else []
    )
    with connected(url) as line:
        line.sendall(head(method, path, *own, *headers, f"Content-Length: {len(data)}") + data)
        return read(line)


def post(url: str, body: Any, *headers: str, path: str = "/v1/completions") -> Answer:
    return ask(url, json.dumps(body).encode(), *headers, path=path)
