"""Clients that leave, early or in the middle: what they asked for ends at once, and its pages are free."""

import dataclasses
import json
import socket
import threading
from urllib.parse import urlsplit

import pytest

from maxstack.serve.http import streams
from tests.serve.http import raw
from tests.serve.http.serving import LETTERS, SETTINGS, served, settle

LONG = {"model": "tiny", "max_tokens": 240, "prompt": "go on", "logit_bias": LETTERS}


def asked(body: dict, path: str = "/v1/completions"):
    data = json.dumps(body).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(data)}")
    return raw.head("POST", path, *lines, close=False) + data


@pytest.fixture
def ended(engine, monkeypatch):
    """Reasons for which the engine was told to end requests."""
    reasons = []
    cancel = engine._loop.cancel
    monkeypatch.setattr(
        engine._loop, "cancel", lambda name, reason: (reasons.append(reason), cancel(name, reason))
    )
    return reasons


def await_ends(ended: list, number: int) -> None:
    tick = threading.Event()
    for _ in range(1000):
        if len(ended) >= number:
            return
        tick.wait(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_ends_what_was_asked(url, engine, ended, stream, n):
    with raw.connected(url) as line:
        line.sendall(asked(LONG | {"stream": stream, "n": n}))
        if stream:
            assert b"data:" in line.recv(65536) + line.recv(65536)
    await_ends(ended, n)
    assert ended == ["cancelled"] * n
    settle(engine)


def test_who_leaves_before_the_first_token_ends_it_too(url, engine, ended, monkeypatch):
    # Nothing comes: the news are held back.
    monkeypatch.setattr(engine, "_hear", lambda news: None)
    with raw.connected(url) as line:
        line.sendall(asked(LONG | {"stream": True}))
        threading.Event().wait(0.2)
    await_ends(ended, 1)
    assert ended == ["cancelled"]
    monkeypatch.undo()
    settle(engine)


def test_who_stops_reading_is_cut_off_in_the_middle_and_its_pages_are_free(engine, ended, monkeypatch):
    device, tick = engine._loop.device, threading.Event()
    results = device.results
    monkeypatch.setattr(device, "results", lambda launched: (tick.wait(0.02), results(launched))[1])
    body = {"model": "tiny", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 230}
    body |= {"stream": True, "logprobs": True, "top_logprobs": 20, "logit_bias": LETTERS}
    with served(engine, dataclasses.replace(SETTINGS, send_s=0.3), room=4096) as url, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((urlsplit(url).hostname, urlsplit(url).port))
        line.sendall(asked(body, "/v1/chat/completions"))
        await_ends(ended, 1)
        assert ended == ["cancelled"]
        settle(engine)


def test_an_error_inside_a_stream_is_an_error_event_and_the_stream_ends(url, engine, client, monkeypatch):
    import openai

    from maxstack.serve.errors import NotFinite
    from maxstack.serve.news import News

    hear = engine._hear

    def failing(news):
        hear(
            [
                News(each.id, finish="error", error=NotFinite("logits are no finite numbers"))
                if len(engine._open[each.id].answer.output.token_ids) > 100
                else each
                for each in news
                if each.id in engine._open
            ]
        )

    monkeypatch.setattr(engine, "_hear", failing)
    stream = client.completions.create(**LONG, stream=True)
    with pytest.raises(openai.APIError, match="finite") as failed:
        list(stream)
    assert failed.value.code == "generation_failed"
    monkeypatch.undo()
    settle(engine)


def test_a_stream_that_waits_begins_without_a_token_and_says_that_it_lives(engine, monkeypatch):
    """In a long queue nobody in between gives it up."""
    hear, held = engine._hear, []
    monkeypatch.setattr(streams, "HOLD_S", 0.05)
    monkeypatch.setattr(engine, "_hear", held.extend)
    with served(engine, dataclasses.replace(SETTINGS, keep_alive_s=0.05)) as url, raw.connected(url) as line:
        line.sendall(asked(LONG | {"stream": True, "max_tokens": 3}))
        seen = b""
        while seen.count(b": keep-alive\n\n") < 2:
            seen += line.recv(65536)
        assert seen.startswith(b"HTTP/1.1 200")
        assert b"data:" not in seen
        monkeypatch.setattr(engine, "_hear", hear)
        [stream] = engine._open.values()
        stream.loop.call_soon_threadsafe(hear, [*held])
        while b"[DONE]" not in seen:
            seen += line.recv(65536)
    assert b'"finish_reason":"length"' in seen
    settle(engine)
