"""Clients that ask and note when what arrives. Nothing is parsed until all is over: that would be measured too."""

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from maxstack.bench.serve.asks import Ask
from maxstack.config import RunError

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to ask, and how."""

    url: str
    """As far as, and without, `/v1`."""
    model: str
    chat: bool = False
    """Ask for the answer to a message; otherwise for the continuation of a text."""
    key: str | None = None
    plain: bool = False
    """Only fields that OpenAI's own server knows: answers may be shorter than asked for."""
    temperature: float = 0.0
    timeout_s: float = 600.0
    """Between two pieces of an answer."""

    @property
    def path(self) -> str:
        """Of the route that is asked."""
        return f"{self.url}/v1/{'chat/completions' if self.chat else 'completions'}"

    @property
    def headers(self) -> dict[str, str]:
        """Of each request."""
        own = {"content-type": "application/json", "accept-encoding": "identity"}
        return own | ({"authorization": f"Bearer {self.key}"} if self.key else {})

    def body(self, ask: Ask) -> bytes:
        """The request."""
        said: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True},
            "max_tokens": ask.tokens, "temperature": self.temperature,
        }  # fmt: skip
        if self.chat:
            roles = (("system", ask.system), ("user", ask.prompt))
            said["messages"] = [{"role": role, "content": text} for role, text in roles if text]
        elif isinstance(ask.prompt, str):
            said["prompt"] = f"{ask.system} {ask.prompt}".strip()
        else:
            said["prompt"] = [*ask.system, *ask.prompt]
        if not self.plain:
            said |= {"ignore_eos": True}
        return json.dumps(said).encode()


@dataclass
class Heard:
    """What came back, as it came, with the times of `perf_counter`."""

    ask: Ask
    due: float
    """When it should have been sent."""
    sent: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None
    """What kind of failure it was."""
    said: str = ""
    """What the server said of it."""


class Clients:
    """Connections to a server."""

    def __init__(self, server: Server):
        self.server = server
        self._timeout = httpx2.Timeout(server.timeout_s, connect=30.0)
        self._limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)

    async def __aenter__(self) -> "Clients":
        self._http = httpx2.AsyncClient(timeout=self._timeout, limits=self._limits, trust_env=False)
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._http.aclose()

    async def one(self, ask: Ask, due: float | None = None) -> Heard:
        """Ask, and listen to the end."""
        body = self.server.body(ask)
        heard = Heard(ask, clock() if due is None else due)
        heard.sent = clock()
        try:
            async with self._http.stream(
                "POST", self.server.path, content=body, headers=self.server.headers
            ) as response:
                async for piece in response.aiter_raw():
                    heard.pieces.append((clock(), piece))
                if response.status_code != 200:
                    heard.error = f"status {response.status_code}"
                    heard.said = b"".join(piece for _, piece in heard.pieces)[:500].decode(errors="replace")
        except httpx2.TimeoutException as error:
            heard.error, heard.said = "timeout", type(error).__name__
        except httpx2.ConnectError as error:
            heard.error, heard.said = "no connection", str(error)
        except httpx2.TransportError as error:
            heard.error, heard.said = "broken off", str(error)
        heard.ended = clock()
        return heard

    async def closed_loop(self, asks: Sequence[Ask], at_once: int) -> list[Heard]:
        """So many clients, each of which asks again when it is answered."""
        left, heard = iter(asks), list[Heard]()

        async def client() -> None:
            for ask in left:
                heard.append(await self.one(ask))

        await asyncio.gather(*(client() for _ in range(min(at_once, len(asks)))))
        return heard

    async def timed(self, asks: Iterable[Ask]) -> list[Heard]:
        """Each at its time, however many are still open."""
        start, tasks = clock(), list[asyncio.Task[Heard]]()
        for ask in asks:
            due = start + (ask.at_s or 0.0)
            if (wait := due - clock()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.one(ask, due)))
        return list(await asyncio.gather(*tasks))


def first_model(url: str, key: str | None) -> str:
    """The name of the model that a server offers first. Raises RunError where it does not say."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(f"{url}/v1/models", headers=headers, timeout=30.0, trust_env=False)
        answer.raise_for_status()
        return answer.json()["data"][0]["id"]
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(
            f"{url}/v1/models does not say which models there are ({error}): is the server up, is the address the part "
            "before /v1, and does it want --api-key-file? Or name the model with --name"
        ) from error
