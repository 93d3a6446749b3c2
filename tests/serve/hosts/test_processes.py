"""`maxstack serve` in two processes of one device each: answers of one, and how they end together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.models.save import save
from tests.commands import flags_for
from tests.models.lora import write_adapter
from tests.models.tiny import build
from tests.serve.driven import CONFIG
from tests.train.test_processes import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
READY_S = 400
ENDED_S = 60
MODEL = build(dataclasses.replace(CONFIG, vocab_size=258))
# Sums over devices instead of one sum, in float32, of log-probabilities around 3; another form of the adapters.
ROUNDING = 3e-4
BEGIN = [7, 3, 9, 1, 4, 4, 2, 8, 5, 6] * 2
ASKED = [
    {"prompt": BEGIN, "temperature": 0},
    {"prompt": [*BEGIN, 11, 12], "temperature": 0},  # a prefix that is cached
    {"prompt": BEGIN, "temperature": 1.0, "top_k": 20, "seed": 3},
    {"prompt": [5, 6], "temperature": 0.9, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"prompt": [5, 6], "temperature": 0, "guided_regex": "[a-f]{3}x*"},
    {"prompt": [5, 6, 7], "temperature": 0, "model": "small"},
]


class Served:
    """A server of one process or of several, on this machine."""

    def __init__(self, folder: Path, cache: Path, processes: int, *options: str):
        self.port = free_port()
        coordinator = f"127.0.0.1:{free_port()}"
        adapter = f"small={folder / 'adapter'}"
        command = [
            sys.executable, *f"-m maxstack serve --model {folder / 'model'} --port {self.port} --rows 2".split(),
            *f"--max-length 64 --tensor {processes} --adapters {adapter}".split(), *options,
        ]  # fmt: skip
        settings = {
            **os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags_for(1), "MAXSTACK_COMPILED_CACHE": str(cache),
            "MAXSTACK_PROCESSES": str(processes), "MAXSTACK_COORDINATOR": coordinator,
        }  # fmt: skip
        self.said = [cache / f"said-{self.port}-{i}" for i in range(processes)]
        cache.mkdir(exist_ok=True)
        self.processes = []
        for index, place in enumerate(self.said):
            with place.open("w") as said:
                own = {**settings, "MAXSTACK_PROCESS": str(index)}
                self.processes.append(subprocess.Popen(command, env=own, stdout=said, stderr=said))

    def __enter__(self):
        until = time.monotonic() + READY_S
        while self.get("/ready")[0] != 200:
            assert time.monotonic() < until, self.told
            assert all(process.poll() is None for process in self.processes), self.told
            time.sleep(0.1)
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    @property
    def told(self) -> str:
        """What all have said."""
        return "\n".join(place.read_text() for place in self.said)

    def get(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        url, data = f"http://127.0.0.1:{self.port}{path}", body and json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ENDED_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, {}

    def complete(self, **asked) -> tuple[int, dict]:
        return self.get("/v1/completions", {"model": "model", "max_tokens": 8, "logprobs": 1, **asked})

    def ended(self) -> list[int]:
        """Exit codes."""
        return [process.wait(ENDED_S) for process in self.processes]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(MODEL, byte_tokenizer(), folder / "model")
    write_adapter(folder / "adapter", MODEL, seed=1, rank=4)
    return folder, folder / "cache"


def test_two_processes_answer_as_one_and_leave_together_when_one_is_asked_to(places):
    with Served(*places, 1) as alone:
        wanted = [alone.complete(**asked) for asked in ASKED]
    with Served(*places, 2) as server:
        for asked, (code, theirs) in zip(ASKED, wanted, strict=True):
            assert code == 200, theirs
            code, mine = server.complete(**asked)
            assert code == 200, mine
            one, other = mine["choices"][0], theirs["choices"][0]
            assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
            assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
            assert one["logprobs"]["token_logprobs"] == pytest.approx(
                other["logprobs"]["token_logprobs"], abs=ROUNDING
            )
            assert mine["usage"] == theirs["usage"]  # the same prefixes were cached
        assert server.get("/health")[0] == 200
        server.processes[1].send_signal(signal.SIGTERM)
        assert server.ended() == [0, 0], server.told
        assert "process 1 was asked to leave" in server.told


def test_a_follower_that_is_killed_makes_the_leader_unhealthy_and_fails_what_is_under_way(places):
    with Served(*places, 2) as server:
        found: list = []
        asking = threading.Thread(target=lambda: found.append(ask_on_and_on(server)))
        asking.start()
        while not server.complete(prompt=[1])[0]:
            pass
        server.processes[1].kill()
        asking.join(ENDED_S)
        [(code, body)] = found
        assert code == 503
        assert body["error"]["code"] == "engine_dead"
        code, health = server.get("/health")
        assert code == 503
        # Whatever is noticed first: the link's end, or that the step they were in cannot end.
        assert any(why in json.dumps(health) for why in ("process 1", "a step failed in process 0"))
        assert server.complete(prompt=[1])[0] == 503
        server.processes[0].send_signal(signal.SIGTERM)
        assert server.processes[0].wait(ENDED_S) == 1, server.told


def ask_on_and_on(server: Served) -> tuple[int, dict]:
    """The first answer that is no answer."""
    while True:
        code, body = server.complete(prompt=BEGIN, max_tokens=40)
        if code != 200:
            return code, body


def test_followers_end_when_the_leader_is_killed(places):
    with Served(*places, 2) as server:
        server.processes[0].kill()
        assert server.processes[1].wait(ENDED_S) != 0
        assert "process 0 is gone" in server.told
