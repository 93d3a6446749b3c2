"""Management: adapters and weights come and go by the management key, from this machine alone."""

import asyncio
import contextlib
from typing import Any

import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.save import save
from maxstack.models.transformer import Transformer
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate import management
from tests.serve.operate.pretend import model
from tests.serve.operate.test_running import MANAGEMENT_KEY, run, server

SETTINGS = Settings(model_name="tiny", management_key=MANAGEMENT_KEY)
OWN = {"authorization": f"Bearer {MANAGEMENT_KEY}"}


class Adapters:
    """In the place of the engine's."""

    def __init__(self):
        self.held: dict[str, str] = {}

    def names(self) -> list[str]:
        return list(self.held)

    def load(self, name: str, folder) -> None:
        self.held[name] = str(folder)

    def unload(self, name: str) -> None:
        del self.held[name]


@contextlib.asynccontextmanager
async def managed():
    async with server(settings=SETTINGS) as here:

        async def ask(method: str, path: str, body: Any = None) -> Any:
            return await here.client.request(method, f"/manage{path}", json=body, headers=OWN)

        yield here, ask


def test_adapters_are_loaded_listed_and_unloaded(tmp_path):
    async def work() -> None:
        async with managed() as (here, ask):
            here.engine.adapters = Adapters()
            loaded = await ask("POST", "/adapters", {"name": "mine", "folder": str(tmp_path)})
            assert loaded.json() == {"adapters": ["mine"]}
            assert "mine" in [each["id"] for each in (await here.get("/v1/models")).json()["data"]]
            assert (await ask("GET", "/adapters")).json() == {"adapters": ["mine"]}
            for body, part in (
                ({"name": "x", "folder": "hf:owner/name"}, "nothing is fetched"),
                ({"name": "x", "folder": "https://example.org/x"}, "nothing is fetched"),
                ({"name": "x y", "folder": str(tmp_path)}, "name"),
                ({"name": "x", "folder": str(tmp_path), "more": 1}, "more"),
            ):  # fmt: skip
                refused = await ask("POST", "/adapters", body)
                assert (refused.status_code, part in refused.text) == (400, True), refused.text
            assert (await ask("DELETE", "/adapters/mine")).json() == {"adapters": []}
            assert (await ask("DELETE", "/adapters/mine")).status_code == 404

    run(work)


def test_an_engine_without_room_for_adapters_says_so(tmp_path):
    async def work() -> None:
        async with managed() as (_, ask):
            refused = await ask("POST", "/adapters", {"name": "mine", "folder": str(tmp_path)})
            assert refused.status_code == 400
            assert "no room for adapters" in refused.text

    run(work)


def test_weights_are_exchanged_and_the_watchdog_is_patient_meanwhile(tmp_path):
    save(model(), byte_tokenizer(), tmp_path / "model")
    swapped: list[Any] = []

    async def work() -> None:
        async with managed() as (here, ask):

            async def swap(new: Transformer) -> None:
                assert here.operation.watchdog._patient == 1
                swapped.append(new)

            here.engine.swap_weights = swap
            done = await ask("POST", "/weights", {"model": str(tmp_path / "model")})
            assert done.status_code == 200, done.text
            assert here.operation.watchdog._patient == 0
            refused = await ask("POST", "/weights", {"model": "smollm2-135m-instruct"})
            assert (refused.status_code, "nothing is fetched" in refused.text) == (400, True)

    run(work)
    [new] = swapped
    assert new.config == model().config


def test_a_profile_is_taken_and_its_length_is_bounded(tmp_path, monkeypatch):
    taken: list[tuple] = []
    monkeypatch.setattr(management, "profile", lambda *what: taken.append(what))

    async def work() -> None:
        async with managed() as (_, ask):
            assert (
                await ask("POST", "/profile", {"folder": str(tmp_path), "seconds": 0.5})
            ).status_code == 200
            assert (
                await ask("POST", "/profile", {"folder": str(tmp_path), "seconds": 61})
            ).status_code == 400

    run(work)
    assert taken == [(tmp_path, 0.5)]


@pytest.mark.slow
def test_a_profile_is_a_trace_of_the_profiler(tmp_path):
    management.profile(tmp_path / "trace", 0.1)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_without_their_key_there_are_no_such_routes():
    async def work() -> None:
        async with server() as here:
            for path in ("adapters", "weights", "drain", "profile"):
                asked = await here.client.post(f"/manage/{path}", json={}, headers=OWN)
                assert asked.status_code == 404, path
            assert not here.operation.draining

    asyncio.run(work())
