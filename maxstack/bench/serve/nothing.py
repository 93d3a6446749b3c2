"""A server that does nothing but answer at stated times: what a client measures against it is the client.

python -m maxstack.bench.serve.nothing '{"first_s": 0.01, "gap_s": 0.005}'     prints its port
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """What it does to a request: the first piece after `first_s`, each further one `gap_s` later."""

    first_s: float = 0.0
    gap_s: float = 0.005
    refuse_every: int = 0
    """Every so many requests one is told 429; 0 for none."""
    cut_every: int = 0
    """Every so many requests one answer ends in the middle; 0 for none."""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve on a free port of this machine; gives the port."""
        numbers = iter(range(1, 1 << 62))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await self._answer(reader, writer, numbers):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the client has left
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, numbers: Any) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        body = await reader.readexactly(length)
        if lines[0].startswith(b"get"):
            _whole(writer, b"200 OK", {"data": [{"id": "nothing"}]})
            return True
        number, said = next(numbers), json.loads(body)
        if self.refuse_every and number % self.refuse_every == 0:
            _whole(writer, b"429 Too Many Requests", {"error": {"message": "come back later"}})
            return True
        writer.write(HEAD)
        tokens = said["max_tokens"]
        cut = self.cut_every and number % self.cut_every == 0
        # Times are kept from the start: small waits that are each a little long do not add up.
        begin = asyncio.get_running_loop().time()
        for i in range(tokens // 2 if cut else tokens):
            await asyncio.sleep(begin + self.first_s + i * self.gap_s - asyncio.get_running_loop().time())
            _event(writer, {"choices": [{"index": 0, "text": " word", "finish_reason": None}]})
        if cut:
            return False
        usage = {"prompt_tokens": len(said["prompt"].split()), "completion_tokens": tokens}
        _event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        _event(writer, {"choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return True


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    text = b"data: " + json.dumps(event).encode() + b"\n\n"
    writer.write(b"%x\r\n%b\r\n" % (len(text), text))


def _whole(writer: asyncio.StreamWriter, status: bytes, value: dict[str, Any]) -> None:
    text = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(text), text))


async def _main(settings: dict[str, Any]) -> None:
    async with Nothing(**settings).listening() as port:
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until whoever started it lets go


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
