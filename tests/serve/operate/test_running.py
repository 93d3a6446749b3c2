"""A server's life: it answers while it starts, serves, is watched, and leaves without cutting anybody off."""

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from maxstack.config import UserError
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.listen import listening, url_of
from maxstack.serve.operate.management import management
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.phases import Phases
from maxstack.serve.operate.probes import probes
from maxstack.serve.operate.request_log import RequestLog
from maxstack.serve.operate.running import Serving, serve
from tests.serve.operate.pretend import pretend_engine

KEY, MANAGEMENT_KEY = "k" * 32, "m" * 32
ASKED = {"prompt": "hello", "max_tokens": 8, "temperature": 0}


class Served:
    """A server in this event loop, and a client of it."""

    def __init__(self, client: httpx2.AsyncClient, operation: Operation, engine: Any, code: asyncio.Task):
        self.client, self.operation, self.engine, self.code = client, operation, engine, code
        self.device = engine._loop.device

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        return await self.client.get(path, headers=headers)

    async def ask(self, **changes: Any) -> httpx2.Response:
        return await self.client.post("/v1/completions", json=ASKED | changes)

    async def until_ready(self) -> None:
        while (await self.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)

    async def until_open(self, count: int = 1) -> None:
        while len(self.engine._open) < count:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def server(
    begin: Callable[[], None] = lambda: None, *, settings: Settings | None = None, ready: bool = True,
    drain_s: float = 30.0, leave: Callable[[int], Any] = os._exit, engine: Any = None, verify: Any = True,
    **options: Any,
) -> AsyncIterator[Served]:  # fmt: skip
    """`begin` is called in the thread that starts; the server is asked to leave at the end, if it still runs. Without
    an `engine` it has a pretended one. `verify` is whom a client trusts where the settings have TLS."""
    engine, operation = engine or pretend_engine(), Operation("tiny", phases=Phases(), **options)
    operation.routers += [probes(operation), management(operation)]

    def begun():
        begin()
        engine.warm_up(operation.phases.compiled)
        operation.attach(engine)
        return engine

    with listening("127.0.0.1", 0) as sock:
        serving = Serving(
            settings=settings or Settings(model_name="tiny"),
            drain_s=drain_s,
            say=lambda text: None,
            leave=leave,
        )
        url = url_of(sock, "https" if serving.settings.tls else "http")
        code = asyncio.create_task(serve(begun, operation, sock, serving))
        async with httpx2.AsyncClient(base_url=url, timeout=30, verify=verify) as client:
            here = Served(client, operation, engine, code)
            try:
                if ready:
                    await here.until_ready()
                yield here
            finally:
                if (go_on := getattr(engine._loop.device, "go_on", None)) is not None:
                    go_on.set()
                if not code.done():
                    operation.drain_asked.set()
                with contextlib.suppress(UserError):
                    await code


def run(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def test_it_answers_while_it_starts_and_takes_requests_when_it_is_ready():
    go_on = threading.Event()

    async def work() -> None:
        async with server(lambda: go_on.wait(30), ready=False) as here:
            health, ready, asked = await here.get("/health"), await here.get("/ready"), await here.ask()
            assert (health.status_code, health.json()["status"]) == (200, "starting")
            assert (ready.status_code, ready.json()["phase"]) == (503, "load")
            assert (asked.status_code, asked.json()["error"]["code"]) == (503, "starting")
            assert "Retry-After" in asked.headers
            go_on.set()
            await here.until_ready()
            answer = await here.ask()
            assert answer.json()["choices"][0]["text"] == "a" * 8
            assert (await here.get("/version")).json()["model"] == "tiny"

    run(work)


def test_a_model_that_cannot_be_served_ends_the_start_with_its_error():
    def begin() -> None:
        raise UserError("no such model")

    async def work() -> None:
        async with server(begin, ready=False) as here:
            with pytest.raises(UserError, match="no such model"):
                await here.code

    run(work)


def test_asked_to_leave_while_it_starts_it_leaves_at_once():
    go_on, left = threading.Event(), []

    def leave(code: int) -> None:
        left.append(code)
        raise SystemExit

    async def work() -> None:
        async with server(lambda: go_on.wait(30), ready=False, leave=leave) as here:
            await here.get("/health")
            os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.suppress(SystemExit):
                await here.code

    try:
        with contextlib.suppress(SystemExit):
            run(work)
    finally:
        go_on.set()
    assert left == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_finish_and_refuses_the_rest(number):
    async def work() -> None:
        async with server() as here:
            here.device.go_on.clear()
            asked = asyncio.create_task(here.ask())
            await here.until_open()
            os.kill(os.getpid(), number)
            while not here.operation.draining:
                await asyncio.sleep(0.01)
            ready, health, late = await here.get("/ready"), await here.get("/health"), await here.ask()
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert health.status_code == 200
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert not here.code.done()
            here.device.go_on.set()
            answer = await asked
            assert answer.json()["choices"][0]["text"] == "a" * 8
            assert await here.code == 0

    run(work)


def test_what_is_not_done_in_time_is_cut_off_and_the_server_leaves():
    async def work() -> None:
        async with server(drain_s=0.2) as here:
            here.device.takes_s = 0.1
            asked = asyncio.create_task(here.ask(max_tokens=50))
            await here.until_open()
            here.operation.drain_asked.set()
            assert (await asked).status_code == 503
            assert await here.code == 0

    run(work)


def test_a_stuck_engine_is_seen_from_outside_and_takes_no_more():
    async def work() -> None:
        async with server(stuck_after_s=0.2) as here:
            here.operation.watchdog.tick_s = 0.05
            here.device.go_on.clear()
            asked = asyncio.create_task(here.ask())
            while (health := await here.get("/health")).status_code == 200:
                await asyncio.sleep(0.05)
            assert health.json()["status"] == "stuck"
            assert "no step of the engine was done" in health.json()["reason"]
            late = await here.ask()
            assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_stuck")
            here.device.go_on.set()
            assert (await asked).status_code == 200
            while (await here.get("/health")).status_code != 200:
                await asyncio.sleep(0.05)

    run(work)


def test_keys_guard_all_but_the_probes_and_management_takes_its_own():
    settings = Settings(model_name="tiny", api_keys=(KEY,), management_key=MANAGEMENT_KEY)

    async def work() -> None:
        async with server(settings=settings) as here:
            assert (await here.get("/health")).status_code == 200
            for path in ("/metrics", "/version", "/manage/adapters"):
                assert (await here.get(path)).status_code == 401, path
            assert (await here.get("/metrics", authorization=f"Bearer {KEY}")).status_code == 200
            assert (await here.get("/manage/adapters", authorization=f"Bearer {KEY}")).status_code == 401
            own = {"authorization": f"Bearer {MANAGEMENT_KEY}"}
            drained = await here.client.post("/manage/drain", headers=own, json={})
            assert drained.json() == {"status": "draining", "under_way": 0}
            assert await here.code == 0
        async with server() as here:
            assert (await here.get("/manage/adapters")).status_code == 404

    run(work)


def test_each_request_is_a_line_without_its_text_unless_that_is_asked_for(tmp_path):
    async def work(file, **options) -> list[dict]:
        async with server(requests=RequestLog(file), **options) as here:
            await here.client.post("/v1/completions", json=ASKED, headers={"x-request-id": "mine"})
            await here.get("/nothing")
        return [json.loads(line) for line in file.read_text().splitlines()]

    records = asyncio.run(work(tmp_path / "a"))
    assert [(record["path"], record["status"]) for record in records] == [
        ("/v1/completions", 200),
        ("/nothing", 404),
    ]
    first = records[0]
    assert (first["id"], first["prompt_tokens"], first["completion_tokens"], first["finish"]) == (
        "mine", 6, 8, ["length"],
    )  # fmt: skip
    assert first["queue_s"] <= first["ttft_s"] <= first["seconds"]
    assert "prompts" not in first
    assert "aaaa" not in json.dumps(records)
    [told, _] = asyncio.run(work(tmp_path / "b", log_prompts=True))
    assert (told["prompts"][0][1:], told["answers_text"]) == (list(b"hello"), ["a" * 8])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_for_logs_hurts_no_request():
    async def work() -> None:
        async with server(requests=RequestLog(Path("/dev/full"))) as here:
            for _ in range(3):
                assert (await here.ask()).status_code == 200
            text = (await here.get("/metrics")).text
            assert "maxstack:log_lines_dropped_total 3.0" in text

    run(work)


def test_an_engine_whose_steps_fail_is_not_healthy_and_gets_well_by_one_that_does_not():
    async def work() -> None:
        async with server() as here:
            here.device.fails = RuntimeError("the device is gone")
            while (await here.get("/health")).status_code == 200:
                assert (await here.ask()).status_code == 500
            assert (await here.get("/health")).json()["status"] == "failing"
            here.device.fails = None
            assert (await here.ask()).status_code == 200
            assert (await here.get("/health")).status_code == 200
            assert "maxstack:failed_steps_total{" in (await here.get("/metrics")).text

    run(work)
