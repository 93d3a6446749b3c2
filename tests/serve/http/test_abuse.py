"""Clients in numbers that behave badly: afterwards every page is free, nothing has grown, and a request takes as many
steps as it took before.

MAXSTACK_ABUSE=1000 says how many clients leave; the normal run has fewer.
"""

import asyncio
import dataclasses
import gc
import json
import os
import resource
import threading
from random import Random
from urllib.parse import urlsplit

import psutil
import pytest

from tests.serve.http.serving import LETTERS, LIMITS, SETTINGS, served, settle, tiny_engine

LEAVING = int(os.environ.get("MAXSTACK_ABUSE", "80"))
AT_ONCE = 40
CONNECTIONS = 500
PROBE = {"model": "tiny", "max_tokens": 24, "prompt": "probe", "logit_bias": LETTERS, "temperature": 0}
# A process that serves grows a little while its caches fill: twice, before what counts begins.
GROWN_BYTES, GROWN_OBJECTS = 24e6, 0.02


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(limits=dataclasses.replace(LIMITS, waiting=4000))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine):
    with served(engine, dataclasses.replace(SETTINGS, body_s=1.0)) as url:
        yield url


@pytest.fixture
def unharmed(engine, url):
    """Compares a lone request before and after."""
    before = asyncio.run(probe(engine, url))
    yield
    settle(engine)
    assert asyncio.run(probe(engine, url)) == before
    assert engine.compilations == 0
    assert engine.dead is None


async def probe(engine, url: str) -> tuple[str, int]:
    """The text of a lone request, and the plans that it took: at most two are launched past its end."""
    plans = engine.scheduler.counters.plans
    status, body = await whole(url, PROBE)
    assert status == 200
    for _ in range(1000):
        if engine.scheduler.idle:
            break
        await asyncio.sleep(0.01)
    return json.loads(body)["choices"][0]["text"], engine.scheduler.counters.plans - plans


def request(body: dict | bytes, path: str = "/v1/completions", *, length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + data


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port)


async def whole(url: str, body: dict | bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
    """Status and body of an answer."""
    reader, writer = await connect(url)
    try:
        writer.write(request(body, path))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        lines = head.decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        return int(lines[0].split()[1]), await reader.readexactly(length)
    finally:
        writer.close()


async def leave(url: str, random: Random) -> None:
    """Ask for a long answer, hear some of it, and go without a word."""
    reader, writer = await connect(url)
    body = {"model": "tiny", "max_tokens": 200, "prompt": "x" * random.randint(1, 40), "stream": True}
    writer.write(request(body | {"logit_bias": LETTERS, "n": random.choice((1, 1, 2))}))
    for _ in range(random.randint(0, 6)):
        await asyncio.wait_for(reader.read(200), 60)
    writer.transport.abort()


async def leave_all(url: str, count: int, seed: int) -> None:
    random, room = Random(seed), asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with room:
            await leave(url, random)

    await asyncio.gather(*(one() for _ in range(count)))


def held() -> tuple[int, int, int, int]:
    """What a leak would show in: bytes, objects, files, threads."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, len(gc.get_objects()), process.num_fds(), threading.active_count()


def test_clients_that_leave_in_the_middle_leave_nothing_behind(engine, url, unharmed):
    for seed in (0, 1):
        asyncio.run(leave_all(url, max(LEAVING // 4, 20), seed))
        settle(engine)
    before = held()
    asyncio.run(leave_all(url, LEAVING, 2))
    settle(engine)
    after = held()
    assert after[0] - before[0] < GROWN_BYTES
    assert after[1] < before[1] * (1 + GROWN_OBJECTS)
    assert after[2] <= before[2] + 2
    assert after[3] == before[3]
    counters = engine.scheduler.counters
    assert counters.request_success["cancelled"] > 0
    assert counters.num_requests_running == counters.num_requests_waiting == 0


def test_readers_that_read_nothing_hold_nobody_up(engine, url, unharmed):
    async def run():
        slow = [await connect(url) for _ in range(8)]
        body = {"model": "tiny", "max_tokens": 200, "prompt": "slow", "stream": True, "logprobs": 5}
        for reader, writer in slow:
            reader._transport.pause_reading()
            writer.write(request(body | {"logit_bias": LETTERS}))
        texts = [await whole(url, PROBE) for _ in range(4)]
        for _, writer in slow:
            writer.transport.abort()
        return texts

    assert {status for status, _ in asyncio.run(run())} == {200}


def test_bodies_that_stop_half_way_end_in_time_and_cost_nothing(engine, url, unharmed):
    async def half(stay: bool) -> int | None:
        reader, writer = await connect(url)
        data = json.dumps(PROBE).encode()
        writer.write(request(data[: len(data) // 2], length=len(data)))
        try:
            if stay:
                line = await asyncio.wait_for(reader.readline(), 60)
                return int(line.split()[1])
            await asyncio.sleep(0.01)
            return None
        finally:
            writer.transport.abort()

    async def run():
        return await asyncio.gather(*(half(stay=i % 2 == 0) for i in range(40)))

    asked = engine.scheduler.counters.prompt_tokens
    told = [status for status in asyncio.run(run()) if status is not None]
    assert told == [408] * 20
    assert engine.scheduler.counters.prompt_tokens == asked


def test_heads_that_trickle_in_hold_nobody_up(url, unharmed):
    async def run():
        lines = [await connect(url) for _ in range(30)]
        for _, writer in lines:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHo")
        found = await whole(url, PROBE)
        for _, writer in lines:
            writer.transport.abort()
        return found

    assert asyncio.run(run())[0] == 200


@pytest.fixture
def room_for_files():
    """As many as this process may open, in both directions of each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + psutil.Process().num_fds() + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine lets a process open {hard} files; {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_five_hundred_connections_are_held_and_let_go(engine, url, unharmed, room_for_files):
    before = psutil.Process().num_fds()

    async def run():
        idle = [await connect(url) for _ in range(CONNECTIONS - 50)]
        asked = [await connect(url) for _ in range(50)]
        for _, writer in asked:
            writer.write(request(PROBE))
        lines = await asyncio.gather(*(asyncio.wait_for(reader.readline(), 60) for reader, _ in asked))
        for _, writer in (*idle, *asked):
            writer.close()
        return [int(line.split()[1]) for line in lines]

    assert asyncio.run(run()) == [200] * 50
    tick = threading.Event()
    for _ in range(500):
        if psutil.Process().num_fds() <= before + 2:
            break
        tick.wait(0.01)
    assert psutil.Process().num_fds() <= before + 2


BROKEN = {
    "no UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe", "max_tokens": 1}',
    "half a character": b'{"model": "tiny", "prompt": "\xe2\x82", "max_tokens": 1}',
    "an overlong slash": b'{"model": "tiny", "prompt": "\xc0\xaf", "max_tokens": 1}',
    "an encoded surrogate": b'{"model": "tiny", "prompt": "\xed\xa0\x80", "max_tokens": 1}',
    "UTF-16": '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
    "a lone surrogate": b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
    "a lone low surrogate": b'{"model": "tiny", "prompt": "\\udc00x", "max_tokens": 1}',
    "a surrogate as stop": b'{"model": "tiny", "prompt": "a", "stop": "\\ud800", "max_tokens": 1}',
    "a surrogate as key": b'{"model": "tiny", "\\ud800": 1}',
    "a surrogate as model": b'{"model": "\\ud800", "prompt": "a"}',
    "only zeros": b"\0" * 50,
    "half an object": b'{"model": "tiny", ',
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "a huge number": b'{"model": "tiny", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    "brackets": b"[" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_bodies_are_told_so(url, unharmed, path):
    async def run():
        return {name: await whole(url, data, path) for name, data in BROKEN.items()}

    for name, (status, body) in asyncio.run(run()).items():
        assert 400 <= status < 500, (name, status, body)
        assert json.loads(body)["error"]["message"], name


def test_characters_that_are_odd_but_right_are_served(url, unharmed):
    odd = ("\x00", "\ufeff", "\ufffd", "🏳️‍🌈", "\u202e", "é", "\U0010ffff", " " * 50)

    async def run():
        return [await whole(url, PROBE | {"prompt": text, "max_tokens": 2}) for text in odd]

    assert {status for status, _ in asyncio.run(run())} == {200}


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 2000, b"PRI * HTTP/2.0\r\n\r\n"]
)
def test_what_is_no_http_is_turned_away(url, unharmed, garbage):
    async def run():
        reader, writer = await connect(url)
        writer.write(garbage)
        writer.write_eof()
        said = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return said

    first = asyncio.run(run()).split(b"\r\n")[0]
    assert not first or first.split()[1].startswith(b"4"), first
