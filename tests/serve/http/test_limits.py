"""What comes in is bounded, and whatever is wrong with it is one typed error; the server works as before."""

import dataclasses
import json
import logging
import threading
import urllib.request

import pytest

from maxstack.serve.errors import EngineDead
from maxstack.serve.http.gate import is_local
from maxstack.serve.request import Full
from tests.serve.http import raw
from tests.serve.http.serving import LETTERS, SETTINGS, served, settle

SMALL = dataclasses.replace(SETTINGS, body_s=0.3, body_bytes=4096)
GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def small(engine):
    """A server that takes small bodies, quickly."""
    with served(engine, SMALL) as url:
        yield url


def works(url: str) -> None:
    assert raw.post(url, GOOD).status == 200


NO_JSON = [
    *(
        b"",
        b"{",
        b"nothing",
        b"\x00",
        b"[]",
        b"null",
        b'"text"',
        b"1e999",
        b'{"prompt": NaN}',
        b'{"temperature": Infinity}',
    ),
    *(b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}', b'\xef\xbb\xbf{"prompt": "a"}'),
    *(b"[" * 200 + b"]" * 200, b'{"prompt": ' + b"[" * 3000, b'{"a": 1' + b"0" * 600 + b"}"),
]


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
def test_whatever_is_no_json_of_ours_is_one_400(small, body):
    answer = raw.ask(small, body)
    assert answer.status == 400
    assert {*answer.error} == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"


def test_the_text_of_brackets_is_not_taken_for_depth(small):
    answer = raw.post(small, GOOD | {"prompt": '[[{{"\\' * 30})
    assert answer.status == 200


def test_a_body_that_is_too_long_is_413_told_beforehand_or_not(small):
    body = json.dumps(GOOD | {"prompt": "x" * 5000}).encode()
    assert raw.ask(small, body).status == 413
    with raw.connected(small) as line:  # one that promises more than may come is not waited for
        line.sendall(raw.head("POST", "/v1/completions", "Content-Length: 99999999999999999999999999"))
        assert raw.read(line).status in (400, 413)
    with raw.connected(small) as line:
        line.sendall(raw.head("POST", "/v1/completions", "Transfer-Encoding: chunked"))
        for _ in range(5):
            line.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert raw.read(line).status == 413
    works(small)


def test_a_body_that_does_not_come_whole_is_408(small):
    with raw.connected(small) as line:
        line.sendall(raw.head("POST", "/v1/completions", "Content-Length: 100", close=False) + b'{"prompt"')
        answer = raw.read(line)
    assert (answer.status, answer.error["code"]) == (408, "body_timeout")
    works(small)


def test_headers_that_are_too_long_are_refused(small):
    answer = raw.ask(small, b"{}", f"X-Long: {'x' * 15_900}", f"X-Other: {'x' * 900}")
    assert answer.status in (400, 431)
    works(small)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\xff" * 64, b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_refused(small, data):
    with raw.connected(small) as line:
        line.sendall(data)
        line.shutdown(1)
        raw_answer = line.recv(65536)
    assert not raw_answer or raw_answer.startswith(b"HTTP/1.1 4")
    works(small)


def test_other_kinds_of_body_are_refused(small):
    body = json.dumps(GOOD).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = raw.ask(small, body, f"Content-Type: {kind}")
        assert (answer.status, answer.error["code"]) == (400, "invalid_content_type")
    assert raw.ask(small, body, "Content-Type: application/json; charset=utf-8").status == 200


def test_requests_have_ids_that_come_back_and_bad_ones_are_refused(small):
    assert raw.post(small, GOOD, "x-request-id: mine-1").headers["x-request-id"] == "mine-1"
    first, second = (raw.post(small, GOOD).headers["x-request-id"] for _ in range(2))
    assert first != second
    for bad in ("a b", "x" * 200, "é"):
        answer = raw.post(small, GOOD, f"x-request-id: {bad}")
        assert answer.status == 400
        assert answer.headers["x-request-id"] != bad
    # the same twice at once is the client's affair
    asked = [threading.Thread(target=raw.post, args=(small, GOOD, "x-request-id: same")) for _ in range(3)]
    for thread in asked:
        thread.start()
    assert raw.post(small, GOOD, "x-request-id: same").status == 200
    for thread in asked:
        thread.join()


def test_unknown_paths_and_methods_are_typed_errors(small):
    assert raw.ask(small, b"", path="/v1/nothing", method="GET").error["type"] == "not_found_error"
    answer = raw.ask(small, b"", path="/v1/completions", method="GET")
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")
    assert raw.ask(small, b"", path="/manage/drain").status == 404


def test_a_full_queue_says_when_to_come_back(engine, small, monkeypatch):
    def full(request):
        raise Full(12, 3.4)

    monkeypatch.setattr(engine.scheduler, "add", full)
    for changes in ({}, {"stream": True}):
        answer = raw.post(small, GOOD | changes)
        assert (answer.status, answer.headers["retry-after"]) == (429, "3")
        assert answer.error["type"] == "rate_limit_error"
    monkeypatch.undo()
    works(small)


def test_a_fault_of_ours_says_nothing_to_the_client_and_is_logged_without_the_prompt(
    small, engine, monkeypatch, caplog
):
    def broken(*args, **options):
        raise KeyError("inner thing")

    monkeypatch.setattr(engine, "open_choices", broken)
    with caplog.at_level(logging.DEBUG):
        answer = raw.post(small, GOOD | {"prompt": "a secret thing"})
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "inner thing" not in answer.error["message"]
    assert answer.headers["x-request-id"]
    assert "KeyError" in caplog.text
    assert "a secret thing" not in caplog.text
    monkeypatch.undo()
    works(small)


def test_no_page_elsewhere_may_ask_unless_told(engine, small):
    asking = ("Origin: https://page.example", "Access-Control-Request-Method: POST")
    answer = raw.ask(small, b"", *asking, method="OPTIONS")
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in raw.post(small, GOOD, asking[0]).headers
    with served(engine, dataclasses.replace(SMALL, cors_origins=("https://page.example",))) as url:
        allowed = raw.ask(url, b"", *asking, method="OPTIONS").headers["access-control-allow-origin"]
        assert allowed == "https://page.example"


def test_a_dead_engine_is_503(small, engine, monkeypatch):
    monkeypatch.setattr(type(engine), "dead", property(lambda self: EngineDead("the engine has stopped")))
    answer = raw.post(small, GOOD)
    assert (answer.status, answer.error["code"]) == (503, "engine_dead")
    monkeypatch.undo()
    works(small)


def test_a_deadline_is_504_and_in_a_stream_an_error(small, engine):
    asking = GOOD | {"max_tokens": 200, "timeout_s": 0.001, "logit_bias": LETTERS}
    answer = raw.post(small, asking)
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    settle(engine)


def test_keys_of_both_kinds_are_compared_whole(engine):
    settings = dataclasses.replace(SMALL, api_keys=("right",), management_key="manager")
    with served(engine, settings) as url:
        for header, status in (
            ("Authorization: Bearer right", 200), ("Authorization: Bearer right2", 401),
            ("Authorization: Bearer manager", 401), ("Authorization: Bearer", 401), ("X-None: 1", 401),
            ("Authorization: Basic dXNlcjpyaWdodA==", 200), ("Authorization: Basic !!", 401),
        ):  # fmt: skip
            assert raw.post(url, GOOD, header).status == status, header
        assert raw.ask(url, b"", path="/nothing", method="GET").status == 401
        assert raw.ask(url, b"", path="/openapi.json", method="GET").status == 401
        assert raw.ask(url, b"", path="/health", method="GET").status == 404
        page = raw.ask(url, b"", "Accept: text/html", path="/", method="GET")
        assert page.headers["www-authenticate"].startswith("Basic")
        assert raw.ask(url, b"", "Authorization: Bearer right", path="/manage/x").status == 401
        assert raw.ask(url, b"", "Authorization: Bearer manager", path="/manage/x").status == 404


@pytest.mark.parametrize("before", [b"", b"GET /v1/models HTTP/1.1\r\nHost: here\r\n\r\n"])
def test_who_does_not_finish_the_headers_is_let_go(engine, before):
    """The first ones of a connection, or those after an answer."""
    with served(engine, dataclasses.replace(SMALL, header_s=0.3)) as url, raw.connected(url) as line:
        line.sendall(before)
        if before:
            assert line.recv(65536).startswith(b"HTTP/1.1 200")
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        rest = b""
        while part := line.recv(65536):
            rest += part
        assert b"HTTP/1.1 200" not in rest
        works(url)


def test_each_key_has_prefixes_of_its_own(engine):
    settings = dataclasses.replace(SMALL, api_keys=("one", "two"))
    body = GOOD | {"prompt": "a system prompt that fills several pages of the cache, at eight tokens a page"}
    with served(engine, settings) as url:
        cached = [
            json.loads(raw.post(url, body, f"Authorization: Bearer {key}").body)["usage"][
                "prompt_tokens_details"
            ]
            for key in ("one", "two", "one")
        ]
    assert [each["cached_tokens"] > 0 for each in cached] == [False, False, True]


LONG_WAYS = {
    "escapes without an end": b'"' + b'\\"' * 900_000,
    "fields that are unknown": json.dumps(GOOD | {f"a{i}": 0 for i in range(150_000)}).encode(),
    "fields of a message": json.dumps({"messages": [{f"a{i}": 0 for i in range(150_000)}]}).encode(),
    "entries that are wrong": json.dumps({"prompt": [1, *["a"] * 300_000]}).encode(),
    "biases": json.dumps(GOOD | {"logit_bias": {f"{i}": "x" for i in range(120_000)}}).encode(),
    "empty lists": b'{"prompt": [' + b"[]," * 600_000 + b"[]]}",
}


@pytest.mark.parametrize("body", LONG_WAYS.values(), ids=LONG_WAYS.keys())
def test_two_megabytes_of_wrong_are_one_short_answer(url, body):
    """Neither time nor memory grows with the number of faults: the test would not end, or the answer be long."""
    assert len(body) < 2_000_000
    path = "/v1/chat/completions" if b'"messages"' in body[:20] else "/v1/completions"
    answer = raw.ask(url, body, path=path)
    assert answer.status == 400
    assert len(answer.body) < 1000
    assert (
        "more)" not in answer.error["message"] or int(answer.error["message"].split("(")[-1].split()[0]) < 100
    )


def test_a_template_keeps_the_variables_that_are_not_its_own(url):
    for name in ("messages", "trust_assistant"):
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: True}}
        answer = raw.post(url, body, path="/v1/chat/completions")
        assert (answer.status, answer.error["param"]) == (400, "chat_template_kwargs")


def test_a_page_elsewhere_whose_name_points_here_is_not_answered(engine):
    """Its browser sends that name, and would let it read the answer as its own."""
    with served(engine, dataclasses.replace(SETTINGS, local_names_only=True)) as url:
        refused = raw.post(url, GOOD)  # to a host called "here"
        assert (refused.status, refused.error["code"]) == (403, "host_not_allowed")
        with urllib.request.urlopen(f"{url}/v1/models", timeout=20) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost:8000", True), ("127.0.0.1", True), ("[::1]:80", True), ("a.localhost", True), ("", False),
        ("127.0.0.1.example.org", False), ("localhost.example.org:8000", False), ("10.0.0.1:8000", False),
    ],
)  # fmt: skip
def test_names_of_this_machine(host, local):
    assert is_local(host) == local
