"""What every request passes first: an id, sizes, the key, a body that is whole and JSON. Then it is only watched."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Iterable, Sequence

import pydantic_core
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxstack.serve.http.errors import ApiError, ClientGone, refused
from maxstack.serve.http.operation import Operation, Seen
from maxstack.serve.http.settings import Settings

OPEN = frozenset({"/health", "/ready"})
"""The paths that need no key."""
VERSIONS = frozenset({"1.0", "1.1", "2", "3"})
MANAGED = "/manage/"
LOOPBACK = re.compile(r"127(\.\d{1,3}){3}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, operation: Operation | None):
        self._app, self._settings, self._operation = app, settings, operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        seen = seen_of(scope, headers)
        scope.setdefault("state", {})["seen"] = seen
        if self._operation is not None:
            self._operation.began(seen)
        sending = Sending(send, seen)
        try:
            try:
                self._look_at(scope, headers)
                seen.tenant = check_key(scope["path"], headers, self._settings)
                body = await read_body(receive, headers, self._settings)
                if body:
                    check_json(body, headers, self._settings.depth)
                if self._operation is not None and (no := self._operation.refusal(scope["path"])) is not None:
                    raise no
            except ApiError as error:
                seen.error = error.code or error.body["error"]["type"]
                if isinstance(error, ClientGone):
                    seen.status = error.status_code
                    return
                await error.response(scope, receive, sending)
                return
            await self._app(scope, replay(body, receive), sending)
        except BaseException:
            seen.status, seen.error = seen.status or 500, seen.error or "internal_error"
            raise
        finally:
            seen.ended = time.monotonic()
            if self._operation is not None:
                self._operation.ended(seen)

    def _look_at(self, scope: Scope, headers: Headers) -> None:
        """Raises for a request that goes no further."""
        if scope.get("http_version") not in VERSIONS:
            raise refused(f"HTTP/{scope.get('http_version')} is not spoken here: use HTTP/1.1")
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._settings.header_bytes:
            raise ApiError(
                431, f"the headers have {size} bytes; at most {self._settings.header_bytes} are read"
            )
        host = headers.get("host", "")
        if self._settings.local_names_only and not is_local(host):
            raise ApiError(
                403, f"the request was sent to {host[:100]!r}, and without an API key this server answers to localhost "
                "and 127.0.0.1 only: ask there, or start it with --api-key-file or --allow-no-key",
                code="host_not_allowed",
            )  # fmt: skip
        asked = headers.get("x-request-id")
        if asked is not None and not REQUEST_ID.fullmatch(asked):
            raise refused("x-request-id must be 1 to 128 letters, digits and . _ : -", "x-request-id")


def is_local(host: str) -> bool:
    """Whether a Host header names this machine to itself."""
    name = re.sub(r":\d+\Z", "", host.strip().lower())
    return (
        name in ("localhost", "[::1]") or name.endswith(".localhost") or LOOPBACK.fullmatch(name) is not None
    )


def seen_of(scope: Scope, headers: Headers) -> Seen:
    """The record of a request that has just come."""
    asked = headers.get("x-request-id", "")
    client = scope.get("client")
    return Seen(
        asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex,
        scope["method"],
        scope["path"],
        time.monotonic(),
        client=client[0] if client else "",
        trace={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
    )


def check_key(path: str, headers: Headers, settings: Settings) -> str:
    """The one rule: everything but `OPEN` takes a key where there is one; management takes its own.

    Who asks: a name that a key has, and nobody can find the key by; "" where there are none.
    """
    if path in OPEN:
        return ""
    if path.startswith(MANAGED):
        if settings.management_key is None:
            raise ApiError(404, f"there is nothing at {path}", code="not_found")
        keys: Sequence[str] = (settings.management_key,)
    else:
        keys = settings.api_keys
        if not keys:
            return ""
    given = given_key(headers.get("authorization", ""))
    if given is None or not is_one_of(given, keys):
        # A browser asks for a password by itself, and the page at / can then be opened: the key is the password.
        scheme = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
        raise ApiError(
            401,
            "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": f'{scheme} realm="maxstack"'},
        )
    return hashlib.sha256(given).hexdigest()[:16]


def given_key(authorization: str) -> bytes | None:
    """The key of a header: a bearer token, or the password of basic authentication."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def is_one_of(given: bytes, keys: Iterable[str]) -> bool:
    """In a time that tells nothing of the keys: each of them is compared, whole."""
    equal = False
    for key in keys:
        equal |= hmac.compare_digest(given, key.encode())
    return equal


async def read_body(receive: Receive, headers: Headers, settings: Settings) -> bytes:
    """The body, whole. Raises for one that is too long, too slow, or breaks off."""
    most = settings.body_bytes
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise ApiError(413, f"the body has {length} bytes; at most {most} are read", code="body_too_large")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"the body was not complete after {settings.body_s:g} s", code="body_timeout",
            headers={"Connection": "close"},
        ) from None  # fmt: skip


def check_json(body: bytes, headers: Headers, most_depth: int) -> None:
    """One error for whatever is no JSON that we take: its encoding, its syntax, NaN, its depth."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Not "text/plain": a page elsewhere could send that here without being asked for its origin.
        raise refused(
            "send the body as JSON, with 'Content-Type: application/json'", code="invalid_content_type"
        )
    try:
        pydantic_core.from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise refused(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    # Only now: of what is JSON, each text has its end, and one look at each byte is enough.
    depth = 0
    for found in _BRACKETS.finditer(body):
        if found.lastindex == 1:
            depth += 1
            if depth > most_depth:
                raise refused(f"the body's JSON is more than {most_depth} levels deep", code="invalid_json")
        elif found.lastindex == 2:
            depth -= 1


def replay(body: bytes, receive: Receive) -> Receive:
    """What gives the body again, and after it what comes: that the client has left."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Sending:
    """Sends with the request's id, and notes the status. A reader that takes nothing is the server's to give up."""

    def __init__(self, send: Send, seen: Seen):
        self._send, self._seen = send, seen

    async def __call__(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            self._seen.status = message["status"]
            own = [(b"x-request-id", self._seen.id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)
