"""Management of a real engine over HTTP: adapters and weights come and go, answers follow, and it leaves in order."""

import asyncio
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.adapters import AdapterSlots
from maxstack.models.save import save
from maxstack.serve import AsyncEngine
from maxstack.serve.http.settings import Settings
from tests.models.lora import with_deltas, write_adapter
from tests.models.tiny import build
from tests.serve.driven import CONFIG, LIMITS, ROOM, full
from tests.serve.operate.test_running import MANAGEMENT_KEY, run, server

SETTINGS = Settings(model_name="tiny", management_key=MANAGEMENT_KEY)
OWN = {"authorization": f"Bearer {MANAGEMENT_KEY}"}
ONE = dataclasses.replace(LIMITS, rows=1, chunks=((1, 8),), steps=(1,))
OLD, NEW = build(CONFIG), build(CONFIG, seed=1)
PROMPT = list(b"hello")
# Deltas beside the weights and not in them, sums over pages: float32, of log-probabilities around 5.
ROUNDING = 3e-4
ASKED = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 2, "return_token_ids": True}


def engine() -> AsyncEngine:
    """With room for one adapter."""
    return AsyncEngine(
        OLD, byte_tokenizer(), limits=ONE, buckets=(1,), end_ids=(), adapters=AdapterSlots(count=1, rank=4)
    )


def says(model: Any, answer: Any) -> bool:
    """Whether an answer is that of a model's full forward pass: its likeliest tokens, with its log-probabilities."""
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    ids = [*PROMPT, *choice["token_ids"]]
    logprobs = jax.nn.log_softmax(full(model, jnp.asarray([ids + [0] * (ROOM - len(ids))]))[0])
    wanted = np.asarray(logprobs[len(PROMPT) - 1 : len(ids) - 1]).max(-1)
    return bool(np.allclose(choice["logprobs"]["token_logprobs"], wanted, atol=ROUNDING))


def test_adapters_and_weights_come_and_go_and_the_server_leaves(tmp_path):
    folder, deltas = write_adapter(tmp_path / "poet", OLD, seed=3, rank=4)
    save(NEW, byte_tokenizer(), tmp_path / "new")
    made = engine()

    async def work() -> None:
        async with server(settings=SETTINGS, engine=made) as here:

            async def manage(method: str, path: str, body: Any = None) -> Any:
                done = await here.client.request(method, f"/manage{path}", json=body, headers=OWN)
                assert done.status_code == 200, done.text
                return done.json()

            assert says(OLD, await here.ask(**ASKED))
            assert (await here.ask(**ASKED, model="poet")).status_code == 404
            new = {"name": "poet", "folder": str(folder)}
            assert await manage("POST", "/adapters", new) == {"adapters": ["poet"]}
            assert says(with_deltas(OLD, deltas), await here.ask(**ASKED, model="poet"))
            assert says(OLD, await here.ask(**ASKED))
            more = await here.client.post("/manage/adapters", json=new | {"name": "second"}, headers=OWN)
            assert more.status_code == 400, "there is room for one"
            assert await manage("DELETE", "/adapters/poet") == {"adapters": []}
            assert (await here.ask(**ASKED, model="poet")).status_code == 404
            await manage("POST", "/weights", {"model": str(tmp_path / "new")})
            answer = await here.ask(**ASKED)
            assert says(NEW, answer)
            assert not says(OLD, answer)
            assert made.compilations == 0
            assert (await manage("POST", "/drain"))["status"] == "draining"
            assert await asyncio.wait_for(here.code, 30) == 0

    run(work)


@pytest.mark.slow
def test_a_profile_of_a_working_engine_is_written(tmp_path):
    made = engine()

    async def work() -> None:
        async with server(settings=SETTINGS, engine=made) as here:
            body = {"folder": str(tmp_path / "trace"), "seconds": 0.2}
            asked = here.client.post("/manage/profile", json=body, headers=OWN)
            profiled, answer = await asyncio.gather(asked, here.ask(**ASKED))
            assert (profiled.status_code, answer.status_code) == (200, 200)

    run(work)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
