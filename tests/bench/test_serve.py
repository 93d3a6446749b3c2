"""`maxstack bench serve`: known times give known numbers, and a server that misbehaves is counted, not believed."""

import asyncio
import json

import pytest

from maxstack.bench.command import main
from maxstack.bench.serve.answers import events, read
from maxstack.bench.serve.asks import Ask, drawn, from_trace, write_trace
from maxstack.bench.serve.client import Clients, Heard, Server
from maxstack.bench.serve.nothing import Nothing
from maxstack.bench.serve.numbers import goal, report
from maxstack.config import RunError, UserError
from maxstack.serve.load import SHAREGPT_ANSWER, Load


def event(text: str | None = None, **more) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


def usage(prompt: int, answer: int) -> bytes:
    return event(usage={"prompt_tokens": prompt, "completion_tokens": answer})


def clients_of(port: int) -> Clients:
    return Clients(Server(url=f"http://127.0.0.1:{port}", model="m"))


DONE = b"data: [DONE]\n\n"


def heard(due: float, pieces: list[tuple[float, bytes]], **fields) -> Heard:
    return Heard(
        Ask(prompt="a", tokens=fields.pop("asked", 3)), due, due, pieces, pieces[-1][0] if pieces else due, **fields
    )  # fmt: skip


def test_known_times_give_the_known_numbers():
    one = heard(
        10.0,
        [(10.2, event("a")), (10.3, event("b")), (10.5, event("c") + usage(7, 3) + DONE)],
    )
    other = heard(
        11.0,
        [(11.4, event("a")), (11.5, event("b")), (11.6, event("c")), (12.0, usage(9, 3) + DONE)],
    )
    found = report("x", [read(one), read(other)], goal(["ttft:300", "tpot:200"]))
    assert found.percentiles_s["ttft"]["p50"] == pytest.approx(0.3)
    assert found.percentiles_s["ttft"]["p99"] == pytest.approx(0.2 + 0.99 * 0.2)
    assert found.percentiles_s["tpot"]["mean"] == pytest.approx((0.15 + 0.1) / 2)
    assert found.percentiles_s["itl"]["mean"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.1) / 4)
    assert found.percentiles_s["e2e"]["p50"] == pytest.approx((0.5 + 1.0) / 2)
    assert found.seconds == pytest.approx(2.0)
    assert found.requests_per_s == pytest.approx(1.0)
    assert found.output_tokens_per_s == pytest.approx(3.0)
    assert found.input_tokens_per_s == pytest.approx(8.0)
    assert found.good_requests_per_s == pytest.approx(0.5)  # the second waited 400 ms for its first token
    assert found.errors == {}
    assert "goodput 0.50 requests/s" in found.table()


def test_waiting_in_the_client_counts_as_waiting():
    late = heard(1.0, [(3.0, event("a") + usage(1, 1) + DONE)], asked=1)
    late.sent = 2.5
    answer = read(late)
    assert (answer.ttft_s, answer.late_s) == (2.0, 1.5)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([(1.0, event("a"))], "cut off"),
        ([(1.0, event(error={"message": "boom"}))], "error while streaming"),
        ([(1.0, usage(1, 0) + DONE)], "no text"),
        ([(1.0, b"data: {\n\n")], "not understood"),
        ([], "cut off"),
    ],
)
def test_a_broken_answer_is_no_answer(pieces, error):
    answer = read(heard(0.0, pieces))
    assert answer.error == error
    assert report("x", [answer], {}).errors == {error: 1}


def test_an_event_has_the_time_of_the_piece_that_completes_it():
    whole = event("a") + event("b")
    pieces = [(1.0, whole[:20]), (2.0, whole[20:-1]), (3.0, whole[-1:])]
    assert [when for when, _ in events(pieces)] == [2.0, 3.0]
    assert list(events([(1.0, b": comment\r\n\r\ndata: x\r\n\r\n")])) == [(1.0, b"x")]


def test_chat_and_reasoning_bring_text_and_roles_do_not():
    def delta(**fields):
        return b"data: " + json.dumps({"choices": [{"delta": fields}]}).encode() + b"\n\n"

    pieces = [
        (1.0, delta(role="assistant", content="")),
        (2.0, delta(reasoning_content="hm")),
        (3.0, delta(content="yes")),
        (4.0, delta() + DONE),
    ]
    answer = read(heard(0.0, pieces))
    assert answer.times == [2.0, 3.0]
    assert answer.output_tokens == 2  # no usage: pieces are counted


def test_a_server_that_keeps_its_times_is_measured_so():
    async def run():
        server = Nothing(first_s=0.02, gap_s=0.004)
        async with server.listening() as port, clients_of(port) as clients:
            closed = await clients.closed_loop([Ask(prompt="a b c", tokens=10)] * 6, at_once=3)
            timed = await clients.timed([Ask(prompt="a", tokens=2, at_s=at) for at in (0.0, 0.01, 0.05)])
        return closed, timed

    closed, timed = asyncio.run(run())
    answers = [read(each) for each in closed]
    assert [answer.error for answer in answers] == [None] * 6
    assert [answer.output_tokens for answer in answers] == [10] * 6
    assert [answer.prompt_tokens for answer in answers] == [3] * 6
    # A machine may be slower than told, never faster.
    assert min(answer.ttft_s for answer in answers) >= 0.02
    assert min(answer.e2e_s for answer in answers) >= 0.02 + 9 * 0.004
    # A client asks again only when it was answered: of three, the fourth begins after the first has ended.
    assert sorted(each.sent for each in closed)[3] >= min(each.ended for each in closed)
    # Times of a trace do not wait for answers.
    sent = [each.sent for each in timed]
    assert sent[1] - sent[0] >= 0.01 - 1e-3
    assert sent[2] - sent[0] >= 0.05 - 1e-3


def test_errors_are_counted_by_kind():
    async def run():
        server = Nothing(gap_s=0.0, refuse_every=3, cut_every=4)
        async with server.listening() as port, clients_of(port) as clients:
            return await clients.closed_loop([Ask(prompt="a", tokens=4)] * 12, at_once=1)

    found = report("x", [read(each) for each in asyncio.run(run())], {})
    assert found.errors == {"status 429": 4, "broken off": 2}  # the twelfth is refused, not cut
    assert "come back later" in found.examples["status 429"]
    assert found.requests == 12
    assert found.output_tokens == 6 * 4


def test_nobody_there_is_said_so():
    async def run():
        async with Nothing().listening() as port:
            pass
        async with clients_of(port) as clients:
            return await clients.one(Ask(prompt="a", tokens=1))

    assert asyncio.run(run()).error == "no connection"
    with pytest.raises(RunError, match="/v1/models does not say"):
        main(["serve", "--url", "http://127.0.0.1:9", "--requests", "1"])


def test_a_load_asks_what_the_simulator_draws():
    from maxstack.serve.simulate import _Clients

    for how in ({"rate": 5.0}, {"clients": 3}):
        load = Load(requests=20, seed=3, shared=11, **how)
        simulated = _Clients(load)
        while simulated.left:
            simulated.next_one(0.0)
        asks = drawn(load, vocabulary=1000)
        assert [ask.tokens for ask in asks] == [*simulated.answers.values()]
        of_simulated = [len(request.prompt) for request in simulated._asked.values()]
        assert [len(ask.prompt) + len(ask.system) for ask in asks] == of_simulated
        assert len({ask.system for ask in asks}) == 1
        assert len({ask.prompt for ask in asks}) == 20
        if "rate" in how:
            assert [ask.at_s for ask in asks] == [when for when, _ in sorted(simulated.coming)]


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    file = tmp_path / "trace.jsonl"
    asks = drawn(Load(requests=5, rate=2.0, answer=SHAREGPT_ANSWER))
    write_trace(file, asks)
    again = from_trace(file, speed=2.0)
    assert [ask.prompt for ask in again] == [ask.prompt for ask in asks]
    assert [ask.tokens for ask in again] == [ask.tokens for ask in asks]
    assert [ask.at_s for ask in again] == pytest.approx([(ask.at_s - asks[0].at_s) / 2 for ask in asks])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"prompt": "a"}',
        '{"prompt": "", "output_tokens": 1}',
        '{"output_tokens": 1, "arrival": 1}',
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt": [1, 2], "output_tokens": 1}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        from_trace(file)


@pytest.mark.parametrize(
    "words",
    [
        [], ["--url", "x"], ["--url", "http://a", "--model", "b"], ["--model", "b", "--rate", "1", "--at-once", "2"],
        ["--url", "http://a", "--goodput", "ttft"], ["--url", "http://a", "--requests", "0"],
        ["--simulate", "v6e"],
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_with_the_remedy(words):
    with pytest.raises(UserError):
        main(["serve", *words])


def test_the_verb_writes_numbers_and_a_picture(tmp_path, capsys):
    import subprocess
    import sys

    with subprocess.Popen(
        [sys.executable, "-m", "maxstack.bench.serve.nothing", '{"gap_s": 0.001}'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        port = server.stdout.readline().strip()
        code = main([
            "serve", "--url", f"http://127.0.0.1:{port}/v1", "--requests", "6", "--at-once", "2", "--prompt-tokens",
            "5", "--output-tokens", "4", "--fixed", "--shared", "3", "--json", f"{tmp_path}/a.json", "--picture",
            f"{tmp_path}/a.png", "--write-trace", f"{tmp_path}/a.jsonl", "--goodput", "e2e:60000",
        ])  # fmt: skip
        server.kill()
    assert code == 0
    row = json.loads((tmp_path / "a.json").read_text())
    assert (row["requests"], row["output_tokens"], row["prompt_tokens"], row["errors"]) == (6, 24, 48, {})
    assert row["good_requests_per_s"] == pytest.approx(row["requests_per_s"])
    assert row["client"]["piece_s"] > 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "time to first token" in capsys.readouterr().out
