"""The link between processes that serve together: what it carries, and what it refuses."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from maxstack.config import RunError, UserError
from maxstack.serve.hosts import frames
from maxstack.serve.hosts.calls import Calls
from maxstack.serve.hosts.follower import Follower, found
from maxstack.serve.hosts.frames import HEAD, Kind, Link, LinkLost
from maxstack.serve.hosts.joining import check_same
from maxstack.serve.hosts.leader import Leader, awaited

SECRET = b"s" * 32


def shape(*sizes: int, dtype=np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


TABLE = {("decode", 4): ((shape(4), shape(4, 3, dtype=np.float32)),), "seat": (shape(), shape(5, dtype=bool))}
GIVEN = {
    ("decode", 4): ((np.arange(4, dtype=np.int32), np.ones((4, 3), np.float32)),),
    "seat": (np.int32(7), np.array([1, 0, 1, 1, 0], bool)),
}
WAIT_S = 30


@pytest.fixture
def pair():
    links = [Link(sock) for sock in socket.socketpair()]
    yield links
    for link in links:
        link.close()


def test_calls_arrive_as_they_were_made():
    calls = Calls(TABLE)
    for key, given in GIVEN.items():
        back, arrays = calls.decoded(*calls.encoded(key, given))
        assert back == key
        assert jax.tree.structure(arrays) == jax.tree.structure(given)
        for mine, theirs in zip(jax.tree.leaves(arrays), jax.tree.leaves(given), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


def test_arrays_that_no_program_takes_are_refused_on_both_sides():
    calls = Calls(TABLE)
    for wrong in ((np.int64(7), GIVEN["seat"][1]), (np.int32(7), np.zeros(6, bool)), (np.int32(7),)):
        with pytest.raises(ValueError, match="seat"):
            calls.encoded("seat", wrong)
    number, data = calls.encoded("seat", GIVEN["seat"])
    with pytest.raises(LinkLost, match="bytes"):
        calls.decoded(number, data[:-1])
    with pytest.raises(LinkLost, match="there are 2"):
        calls.decoded(2, b"")


def test_digests_tell_programs_apart():
    assert Calls(TABLE).digest == Calls(dict(reversed(TABLE.items()))).digest
    assert Calls(TABLE).digest != Calls({**TABLE, "seat": (shape(), shape(6, dtype=bool))}).digest


def test_frames_come_whole_and_in_order(pair):
    one, other = pair
    said = [(Kind.CALL, 3, bytes(range(256)) * 999), (Kind.ALIVE, 0, b""), (Kind.END, 0, b"over")]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: [one.send(*each) for each in said])
        assert [other.receive() for _ in said] == said


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (HEAD.pack(99, 0, 0), "kind 99"),
        (HEAD.pack(Kind.LIMITS, 0, 2**20), "at most"),
        (HEAD.pack(Kind.CALL, 0, 2**31), "at most"),
        (HEAD.pack(Kind.CALL, 0, 10) + b"half", "closed"),
    ],
)
def test_what_is_no_frame_ends_the_link(pair, raw, fault):
    one, other = pair
    one._raw(raw)
    one.close()
    with pytest.raises(LinkLost, match=fault):
        other.receive()


def test_silence_ends_the_link(monkeypatch):
    monkeypatch.setattr(frames, "QUIET_S", 0.05)
    one, other = (Link(sock) for sock in socket.socketpair())
    with pytest.raises(LinkLost, match="nothing was heard"):
        one.receive()
    one.close()
    other.close()


def test_who_does_not_know_the_secret_is_refused_by_either_side():
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        port = listening.getsockname()[1]
        leader = pool.submit(awaited, listening, SECRET, 1)
        with pytest.raises(RunError, match="not reached"):
            found(["127.0.0.1"], port, b"w" * 32, 1)
        follower = found(["127.0.0.1"], port, SECRET, 1)  # the leader waits for the right one
        follower.close()
        leader.result(WAIT_S).end()
    one, other = (Link(sock) for sock in socket.socketpair())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (other._raw(b"n" * 32), other._read(68), other._raw(b"p" * 32)))
        with pytest.raises(LinkLost, match="whoever listens"):
            one.introduce(SECRET, 1)
    one.close()
    other.close()


class Together:
    """A leader and a follower in threads."""

    def __init__(self, pair, call):
        one, other = pair
        self.lost: list[str] = []
        self.gone = threading.Event()
        self.leader, self.follower = Leader([one]), Follower(other)
        self.leader.on_lost = self._lose
        self._pool = ThreadPoolExecutor(1)
        self.following = self._pool.submit(self._follow, call)

    def _lose(self, why: str) -> None:
        self.lost.append(why)
        self.gone.set()

    def _follow(self, call) -> str:
        try:
            return self.follower.follow(Calls(TABLE), call)
        finally:
            self.follower.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.leader.end()
        self.follower.close()
        self._pool.shutdown()


def test_a_follower_makes_the_calls_of_the_leader_until_the_end(pair):
    made = []
    with Together(pair, lambda key, given: made.append(key)) as both:
        both.leader.wait(Calls(TABLE))
        for key in ("seat", ("decode", 4), "seat"):
            both.leader.tell(key, GIVEN[key])
        both.leader.end()
        assert both.following.result(WAIT_S) == ""
    assert made == ["seat", ("decode", 4), "seat"]
    assert not both.lost


def test_a_follower_that_dies_is_known_at_once_and_nobody_is_called_any_more(pair):
    with Together(pair, lambda key, given: None) as both:
        both.leader.wait(Calls(TABLE))
        pair[1].close()
        assert both.gone.wait(WAIT_S)
        assert "process 1 of those that serve together is gone" in both.lost[0]
        with pytest.raises(LinkLost, match="process 1"):
            both.leader.tell("seat", GIVEN["seat"])


def test_a_call_that_fails_in_a_follower_ends_the_leader(pair):
    with Together(pair, lambda key, given: None) as both:
        both.leader.wait(Calls(TABLE))
        both.follower.fault("RESOURCE_EXHAUSTED")
        assert both.gone.wait(WAIT_S)
        assert "has failed: RESOURCE_EXHAUSTED" in both.lost[0]
        assert "RESOURCE_EXHAUSTED" in both.following.result(WAIT_S)


def test_processes_with_other_programs_do_not_begin(pair):
    refused = pytest.raises(RunError, match="process 1 has compiled other programs")
    with Together(pair, lambda key, given: None) as both, refused:
        both.leader.wait(Calls({"seat": TABLE["seat"]}))


def test_processes_that_were_started_differently_are_refused_by_name():
    check_same({"model": "a"}, {"model": "a"}, 1)
    with pytest.raises(UserError, match="rows: 4 there, 8 here"):
        check_same({"model": "a", "rows": "4"}, {"model": "a", "rows": "8"}, 1)
