"""`maxstack serve`: what it refuses before anything is read, and a start that only compiles."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from maxstack.data.tokenizer import byte_tokenizer
from maxstack.kernels import cpu_native
from maxstack.models.save import save
from tests.commands import maxstack, refusal
from tests.models.tiny import build
from tests.serve.driven import CONFIG
from tests.serve.operate.pretend import pretended

KEY = "0123456789abcdef" * 2


@pytest.fixture
def refused(capsys):
    return refusal(capsys)


def test_a_request_that_is_wrong_is_refused_with_code_2(refused, tmp_path, capsys):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    serve = ("serve", "--model", tmp_path / "none")
    refused(2, ["--api-key-file", "--allow-no-key"], *serve, "--host", "0.0.0.0")
    refused(2, ["cannot be read"], *serve, "--api-key-file", tmp_path / "no-keys")
    refused(2, ["none of --api-key-file's"], *serve, "--api-key-file", keys, "--management-key-file", keys)
    refused(2, ["no port"], *serve, "--port", "65536")
    refused(2, ["NAME=FOLDER"], *serve, "--adapters", "x")
    refused(2, ["seconds above 0"], *serve, "--drain-seconds", "0")
    refused(2, ["required: --model"], "serve")
    refused(2, [str(tmp_path / "none")], *serve, "--port", "0")
    assert maxstack("serve", "--help") == 0
    assert "--compile-only" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save(build(CONFIG), byte_tokenizer(), folder)
    return folder


def test_sizes_that_cannot_be_are_refused(refused, folder):
    serve = ("serve", "--model", folder, "--port", "0")
    refused(2, ["--max-length 65", "64 tokens"], *serve, "--max-length", "65")
    refused(2, ["--adapter-slots 1"], *serve, "--adapter-slots", "1", "--adapters", "a=x", "b=y")


def test_guesses_are_refused_where_invariant_mode_is_needed(refused, folder, monkeypatch):
    monkeypatch.setattr(cpu_native, "problem", lambda: "switched off")
    serve = ("serve", "--model", folder, "--port", "0", "--invariant")
    refused(2, ["--invariant with --drafts"], *serve, "--drafts", "2")


def test_a_start_that_only_compiles_leaves_with_0_and_says_its_phases(folder, capsys):
    with pretended():
        assert (
            maxstack("serve", "--model", folder, "--compile-only", "--rows", "2", "--max-length", "32") == 0
        )
    told = capsys.readouterr().err
    for phase in (
        "load",
        "weights",
        "3 of 3 programs",
        "every program is compiled",
        "kept for the next start",
    ):
        assert phase in told


@pytest.mark.slow
def test_after_a_start_that_only_compiles_a_server_starts_answers_and_leaves(folder, tmp_path):
    """Processes of their own: signals, exit codes, and the cache of compiled programs as they are."""
    serve = [sys.executable, *f"-m maxstack serve --model {folder} --rows 2 --max-length 32".split()]
    settings = os.environ | {"MAXSTACK_COMPILED_CACHE": str(tmp_path / "cache")}
    subprocess.run([*serve, "--compile-only"], env=settings, timeout=600, check=True)
    serve += ["--port", "0", "--grpc-port", "0"]
    with served(serve, settings, tmp_path / "first.log") as (server, url):
        asked = json.dumps({"prompt": "hello", "max_tokens": 20, "temperature": 0}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 20
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert "gRPC on 127.0.0.1:" in (tmp_path / "first.log").read_text()
    with served(serve, settings, tmp_path / "second.log") as (server, url):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:  # its body never comes
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
            server.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(2)
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 130
    assert "stopped at once" in (tmp_path / "second.log").read_text()


@contextlib.contextmanager
def served(command, settings, log):
    """A server that is ready, and where it answers."""
    with log.open("w") as written:
        server = subprocess.Popen(command, env=settings, stderr=written)
    try:
        yield server, ready_url(log, server)
    finally:
        server.kill()
        server.wait()


def ready_url(log, server) -> str:
    """Where a server answers, once it is ready."""
    tick = threading.Event()
    for _ in range(6000):
        assert server.poll() is None, log.read_text()
        found = re.search(r"http://[0-9.:]+", log.read_text())
        if found is not None:
            try:
                with urllib.request.urlopen(f"{found[0]}/ready", timeout=5):
                    return found[0]
            except urllib.error.URLError:
                pass
        tick.wait(0.1)
    raise AssertionError("the server is not ready")
