"""What the scheduler promises, each promise by an example."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import maxstack
from maxstack.serve.batch import best_shape, fitting_shape, steps_for
from maxstack.serve.plan import Limits, Plan
from maxstack.serve.request import Event, Full, Refused, Request, Result
from maxstack.serve.scheduler import Scheduler
from tests.serve.fake_device import FakeDevice, alone

LIMITS = Limits(
    rows=4, page=4, pages=64, max_length=64, tokens_a_step=40, chunks=((1, 4), (1, 16), (1, 32), (4, 8)),
    steps=(1, 4), waiting=8, step_tokens=100,
)  # fmt: skip
HOST = "request plan pages prefix sequence batch books planning timing scheduler counters cost load simulate".split()


def asked(name: str, prompt=(1, 2, 3, 4, 5), max_tokens: int = 3, arrived: float = 0.0, **more) -> Request:
    """A request whose answer has all of its tokens: the seed is chosen so that no stop token comes."""
    for seed in range(10_000):
        request = Request(
            id=name, prompt=tuple(prompt), max_tokens=max_tokens, arrived=arrived, **{"params": seed, **more}
        )
        if "params" in more or alone(request)[1] == "length":
            return request
    raise AssertionError("every seed gives a stop token")


class Server:
    """A scheduler and a fake device, one plan after another."""

    def __init__(self, limits: Limits = LIMITS, **changes):
        self.limits = replace(limits, **changes)
        self.scheduler = Scheduler(self.limits)
        self.device = FakeDevice(self.limits)
        self.events: list[Event] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def launch(self, now: float = 0.0) -> Plan:
        plan = self.scheduler.plan(now)
        assert plan is not None
        self.device.launch(plan)
        return plan

    def finish(self, now: float = 0.0) -> list[Event]:
        plan, results = self.device.finish()
        events = self.scheduler.done(plan, results, now)
        self.events += events
        return events

    def step(self, now: float = 0.0) -> Plan:
        plan = self.launch(now)
        self.finish(now)
        return plan

    def run(self, now: float = 0.0, most: int = 1000) -> list[Plan]:
        plans = []
        while not self.scheduler.idle and len(plans) < most:
            plans.append(self.step(now))
        return plans

    def answer(self, name: str) -> tuple[int, ...]:
        return tuple(token for event in self.events if event.id == name for token in event.tokens)

    def end(self, name: str) -> str | None:
        [end] = [event.finish for event in self.events if event.id == name and event.finish] or [None]
        return end


def test_a_request_is_read_then_decoded_in_several_steps():
    server = Server()
    request = asked("a", prompt=range(10), max_tokens=7, params=1)
    server.add(request)
    plans = server.run()
    assert [(plan.chunk_shape, plan.steps) for plan in plans][:2] == [((1, 16), 0), (None, 4)]
    assert (server.answer("a"), server.end("a")) == alone(request)


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    server = Server(max_length=128, tokens_a_step=20)
    server.add(asked("short", max_tokens=12))
    server.step()
    server.add(asked("long", prompt=[i % 9 for i in range(50)], arrived=1.0))
    mixed = [server.step() for _ in range(4)]
    assert all(plan.decodes and plan.chunks and plan.steps == 1 for plan in mixed)
    assert [plan.chunks[0].start for plan in mixed] == [0, 16, 32, 48]
    assert [plan.chunks[0].last for plan in mixed] == [False, False, False, True]


def test_a_plan_is_made_before_the_results_of_the_one_before():
    server = Server()
    server.add(asked("a", max_tokens=9))
    first, second = server.launch(), server.launch()
    assert server.scheduler.plan(0.0) is None  # two are under way
    assert first.chunks[0].last
    assert second.decodes[0].length == 6
    server.finish()
    server.finish()
    assert len(server.answer("a")) == 5 or server.end("a") == "stop"


def test_the_end_of_a_sequence_is_noticed_late_and_harms_nobody():
    scheduler = Scheduler(replace(LIMITS, steps=(1,)))
    scheduler.add(asked("a", max_tokens=9))
    scheduler.add(asked("b", prompt=(7, 7), max_tokens=9))
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    rows = {chunk.request.id: chunk.row for chunk in first.chunks}
    events = scheduler.done(first, {rows["a"]: Result((5,), ended=True), rows["b"]: Result((6,))}, 0.0)
    assert [event.finish for event in events] == ["stop", None]
    third = scheduler.plan(0.0)
    assert [decode.request.id for decode in third.decodes] == ["b"]
    events = scheduler.done(second, {rows["a"]: Result((1,)), rows["b"]: Result((2,))}, 0.0)
    assert [(event.id, event.tokens) for event in events] == [("b", (2,))]
    assert scheduler.counters.plan_tokens_dropped == 1


def test_results_from_before_a_restart_are_dropped():
    server = Server(rows=1, ahead=3)
    low = asked("low", max_tokens=6)
    server.add(low)
    server.launch()
    server.add(asked("high", arrived=1.0, priority=1))
    server.launch()
    server.scheduler.cancel("high")
    assert [start.request.id for start in server.launch().starts] == [
        "low"
    ]  # read again, its first token unseen
    while server.device.under_way:
        server.finish()
    assert server.scheduler.counters.plan_tokens_dropped == 2
    server.run()
    assert (server.answer("low"), server.end("low")) == alone(low)


def test_pages_are_taken_as_they_are_needed():
    server = Server(steps=(1,))
    server.add(asked("a", prompt=range(4), max_tokens=9))
    held = []
    while not server.scheduler.idle:
        server.step()
        held.append(server.limits.pages - server.scheduler.pages.available)
    assert held[:5] == [1, 2, 2, 2, 2]


def test_a_cancelled_request_frees_its_pages_in_the_same_step():
    server = Server()
    server.add(asked("a", prompt=range(30), max_tokens=20))
    server.step()
    assert server.scheduler.pages.available == 64 - 8
    assert server.scheduler.cancel("a")
    assert server.scheduler.pages.available == 64
    assert not server.scheduler.cancel("a")
    assert server.scheduler.events() == [Event("a", finish="cancelled", admitted=0.0)]
    assert server.scheduler.idle


def test_pages_of_a_cancelled_request_are_its_own_until_the_plan_is_done():
    server = Server(prefix_cache=False)
    server.add(asked("a", prompt=range(30), max_tokens=20))
    server.launch()
    server.scheduler.cancel("a")
    assert server.scheduler.pages.available == 64 - 8
    server.finish()
    assert server.scheduler.pages.available == 64


def test_the_latest_of_the_lowest_priority_gives_way_and_says_the_same_afterwards():
    server = Server(pages=10, max_length=40, prefix_cache=False, steps=(1,))
    requests = [
        asked("a", prompt=range(12), max_tokens=16, arrived=0.0),
        asked("b", prompt=range(12), max_tokens=16, arrived=1.0),
    ]
    server.add(*requests)
    server.run()
    assert server.scheduler.counters.num_preemptions >= 1
    for request in requests:
        assert (server.answer(request.id), server.end(request.id)) == alone(request)


def test_a_higher_priority_takes_the_row_of_a_lower_one_but_not_of_its_like():
    server = Server(rows=1)
    server.add(asked("low", max_tokens=20, params=2))
    server.step()
    server.add(asked("same", arrived=1.0), asked("high", arrived=2.0, priority=1, max_tokens=2))
    plan = server.step()
    assert [start.request.id for start in plan.starts] == ["high"]
    started = [start.request.id for plan in server.run() for start in plan.starts]
    assert started == ["low", "same"]


def test_waiting_outweighs_priority_in_the_end():
    server = Server(rows=1, level_s=10.0)
    server.add(asked("running", max_tokens=1))
    server.step()
    server.add(asked("patient", arrived=1.0), asked("urgent", arrived=12.0, priority=1))
    started = [start.request.id for plan in server.run() for start in plan.starts]
    assert started == ["patient", "urgent"]


def test_nobody_is_overtaken_for_being_large():
    server = Server(pages=12, prefix_cache=False, max_length=48)
    server.add(asked("first", prompt=range(20), max_tokens=20))
    server.step()
    server.add(asked("large", prompt=range(40), arrived=1.0), asked("small", prompt=(1,), arrived=2.0))
    started = [start.request.id for plan in server.run() for start in plan.starts]
    assert started.index("large") < started.index("small")


def test_a_shared_beginning_is_read_once():
    server = Server()
    system = tuple(i % 9 for i in range(20))
    server.add(*(asked(f"r{i}", prompt=(*system, i, i), arrived=float(i)) for i in range(4)))
    plans = server.run()
    read = sum(chunk.count for plan in plans for chunk in plan.chunks)
    assert read == 22 + 3 * 2
    assert server.scheduler.counters.prefix_cache_queries == 4 * 22
    assert server.scheduler.counters.prefix_cache_hits == 3 * 20
    assert {event.id: event.cached for event in server.events} == {"r0": 0, "r1": 20, "r2": 20, "r3": 20}


def test_a_conversation_goes_on_where_it_was():
    server = Server()
    first = asked("a", prompt=range(9), max_tokens=8, params=4)
    server.add(first)
    server.run()
    history = (*first.prompt, *server.answer("a"))
    server.add(asked("b", prompt=(*history, 1, 2), arrived=1.0))
    server.run()
    # The last token of an answer is never fed.
    assert max(event.cached for event in server.events) == (len(history) - 1) // 4 * 4


def test_the_last_token_of_a_prompt_is_always_computed():
    server = Server()
    server.add(asked("a", prompt=range(8), params=1))
    server.run()
    server.add(asked("b", prompt=range(8), params=1, arrived=1.0))
    plans = server.run()
    assert [chunk.start for plan in plans for chunk in plan.chunks] == [4]
    assert server.answer("a") == server.answer("b")


def test_a_request_may_decline_the_cache():
    server = Server()
    server.add(asked("a", prompt=range(8)))
    server.run()
    server.add(asked("b", prompt=range(8), arrived=1.0, use_cache=False))
    assert [chunk.start for plan in server.run() for chunk in plan.chunks] == [0]


def test_a_deadline_ends_a_request_wherever_it_is():
    server = Server(rows=1)
    server.add(asked("a", max_tokens=40, deadline=5.0), asked("b", deadline=5.0, arrived=1.0))
    server.step(4.9)
    assert server.scheduler.plan(5.0) is None
    assert [(event.id, event.finish) for event in server.scheduler.events()] == [
        ("a", "deadline"),
        ("b", "deadline"),
    ]
    assert server.scheduler.idle


def test_a_bounded_queue_says_when_to_come_back():
    server = Server(rows=1, waiting=2)
    server.add(asked("a", max_tokens=1), asked("b", arrived=1.0, max_tokens=1))
    with pytest.raises(Full, match="2 requests are waiting") as full:
        server.add(asked("c", arrived=2.0))
    assert full.value.retry_after == 1.0  # nothing is known yet
    server.step(0.0)
    for i in range(1, 7):  # one is admitted every 8 seconds
        server.add(asked(f"d{i}", arrived=8.0 * i, max_tokens=1))
        server.step(8.0 * i)
    server.add(asked("d7", arrived=48.0))
    with pytest.raises(Full) as full:
        server.add(asked("e", arrived=48.0))
    assert 4.0 <= full.value.retry_after <= 10.0
    assert server.scheduler.counters.admission_rejections == {"full": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"priority": 101}, "priority 101 is not in -100 … 100"),
        ({"max_tokens": 60}, "5 tokens and max_tokens 60 are 65 tokens, more than the 64"),
        ({"prompt": range(30), "max_tokens": 20}, "50 tokens take 13 pages of 4 tokens, more than the 8"),
        ({"id": "twin"}, "this id is in use"),
    ],
)
def test_what_can_never_be_served_is_refused_with_numbers(changes, words):
    server = Server(pages=8)
    server.add(asked("twin"))
    given = {"id": "a", "prompt": (1, 2, 3, 4, 5), "max_tokens": 3, "arrived": 0.0} | changes
    with pytest.raises(Refused, match=words):
        server.add(Request(**{**given, "prompt": tuple(given["prompt"])}))


def test_a_request_of_exactly_all_pages_is_served():
    server = Server(pages=8)
    # 32 positions: the last token is not fed.
    request = asked("a", prompt=[i % 9 for i in range(20)], max_tokens=13, params=1)
    server.add(request)
    server.run()
    assert (server.answer("a"), server.end("a")) == alone(request)


def test_a_prompt_that_is_only_read_ends_with_its_last_chunk():
    server = Server()
    server.add(asked("a", prompt=range(40), max_tokens=0))
    plans = server.run()
    assert [chunk.end for plan in plans for chunk in plan.chunks] == [32, 40]
    assert [event._replace(admitted=None) for event in server.events] == [Event("a", finish="length")]


def test_a_request_with_masks_made_on_the_host_waits_for_each_token():
    server = Server()
    server.add(asked("a", max_tokens=6, stepwise=True), asked("b", prompt=(3, 3), max_tokens=6))
    server.launch()
    second = server.launch()
    assert [decode.request.id for decode in second.decodes] == ["b"]
    server.finish()
    server.finish()
    plan = server.launch()
    assert {decode.request.id: decode.count for decode in plan.decodes}["a"] == 1


def test_a_failing_row_ends_its_request_alone_and_its_pages_are_forgotten():
    server = Server(steps=(1,))
    good = asked("good", prompt=range(9), max_tokens=4, params=1)
    server.add(good, asked("bad", prompt=range(20, 29), arrived=1.0, max_tokens=4))
    server.step()
    server.device.failing.add("bad")
    server.run()
    [end] = [event for event in server.events if event.id == "bad" and event.finish]
    assert (end.finish, end.error) == ("error", "no finite logits")
    assert (server.answer("good"), server.end("good")) == alone(good)
    server.add(asked("again", prompt=range(20, 29), arrived=2.0))
    server.run()
    assert [event.cached for event in server.events if event.id == "again"][0] == 0


def test_after_the_cache_is_lost_everything_starts_again_but_not_for_ever():
    server = Server(retries=1)
    request = asked("a", prompt=range(9), max_tokens=9, params=8)
    server.add(request)
    server.step()
    server.launch()
    server.device.lose()
    assert server.scheduler.lost(0.0, "out of memory") == []
    assert server.scheduler.pages.available == 64
    server.step()
    server.launch()
    server.device.lose()
    [event] = server.scheduler.lost(0.0, "out of memory")
    assert (event.finish, event.error) == ("error", "out of memory")
    assert server.scheduler.idle


def test_results_are_taken_in_order_and_must_be_possible():
    server = Server()
    server.add(asked("a", max_tokens=9))
    first, second = server.launch(), server.launch()
    with pytest.raises(ValueError, match=r"plan 1 is not the oldest under way \(\[0, 1\]\)"):
        server.scheduler.done(second, {}, 0.0)
    with pytest.raises(ValueError, match="plan 0, row 0: 0 tokens came, 1 were planned"):
        server.scheduler.done(first, {}, 0.0)
    with pytest.raises(ValueError, match="plan 0, row 0: 2 tokens came, 1 were planned"):
        server.scheduler.done(first, {0: Result((1, 2))}, 0.0)
    server.scheduler.done(first, {0: Result((1,))}, 0.0)


def test_the_same_calls_give_the_same_plans():
    def plans() -> list[Plan]:
        server = Server(pages=20)
        for i in range(8):
            server.add(asked(f"r{i}", prompt=[i % 3] * (5 + 3 * i), max_tokens=6, arrived=float(i), params=i))
        return server.run()

    # Requests compare by identity; all else of a plan is numbers.
    assert [repr(plan) for plan in plans()] == [repr(plan) for plan in plans()]


def test_times_are_counted_under_the_names_of_vllm():
    server = Server(steps=(1,))
    server.add(asked("a", max_tokens=3))
    for now in (1.0, 2.0, 4.0):
        server.step(now)
    counters = server.scheduler.counters
    assert counters.time_to_first_token_seconds.sum == 1.0
    assert counters.inter_token_latency_seconds.sum == 3.0
    assert counters.inter_token_latency_seconds.count == 2
    assert counters.e2e_request_latency_seconds.sum == 4.0
    assert counters.request_queue_time_seconds.sum == 1.0
    assert (counters.prompt_tokens, counters.generation_tokens) == (5, 3)
    assert counters.request_success == {"length": 1}
    assert (counters.num_requests_running, counters.kv_cache_usage_perc) == (0, 0.0)


def test_a_step_that_could_never_take_a_new_request_is_refused():
    with pytest.raises(
        ValueError, match="4 rows of 1 tokens and the smallest chunk, 4 tokens, are more than the 7"
    ):
        replace(LIMITS, tokens_a_step=7)
    with pytest.raises(ValueError, match="must rise and begin with 1"):
        replace(LIMITS, steps=(4, 1))


def test_in_invariant_mode_a_prompt_waits_for_pages_rather_than_having_a_chunk_cut():
    server = Server(
        invariant=True, chunks=((1, 16),), pages=8, rows=2, max_length=32, prefix_cache=False, steps=(1,)
    )
    server.add(asked("a", prompt=range(24), max_tokens=2))
    server.launch()
    server.launch()
    server.scheduler.cancel("a")  # both plans may still write its six pages
    request = asked("b", prompt=range(20), max_tokens=3, params=1)
    server.add(request)
    assert server.scheduler.plan(0.0) is None
    server.finish()
    assert server.scheduler.plan(0.0) is None
    server.finish()
    assert [(chunk.start, chunk.count) for plan in server.run() for chunk in plan.chunks] == [
        (0, 16),
        (16, 4),
    ]
    assert (server.answer("b"), server.end("b")) == alone(request, server.limits)


def test_in_invariant_mode_an_answer_is_said_again_and_told_once():
    server = Server(
        pages=10, max_length=40, prefix_cache=False, chunks=((1, 8),), steps=(1, 3), invariant=True
    )
    requests = [
        asked("a", prompt=range(12), max_tokens=16, params=5),
        asked("b", prompt=range(12), max_tokens=16, params=10, arrived=1.0),
    ]
    server.add(*requests)
    plans = server.run()
    counters = server.scheduler.counters
    assert counters.num_preemptions
    assert counters.replayed_tokens
    for request in requests:
        assert (server.answer(request.id), server.end(request.id)) == alone(request, server.limits)
    assert {chunk.start % 8 for plan in plans for chunk in plan.chunks} == {0}


def test_shapes_weigh_padding_against_further_steps():
    shapes = ((1, 32), (1, 128), (1, 512), (4, 128), (8, 32))
    assert best_shape(shapes, [500], 1024, 64) == (1, 512)
    assert best_shape(shapes, [40], 1024, 64) == (1, 32)
    assert best_shape(shapes, [40], 1024, 1000) == (1, 128)  # a second step would cost more than the padding
    assert best_shape(shapes, [30] * 8, 1024, 64) == (8, 32)
    assert best_shape(shapes, [500], 100, 64) == (1, 32)
    assert fitting_shape(shapes, [100, 20]) == (4, 128)
    assert list(steps_for((1, 4, 8), 3)) == [4, 1]
    assert list(steps_for((1, 4, 8), 20)) == [8, 4, 1]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_the_host_side_imports_the_standard_library_and_itself():
    folder = Path(maxstack.__file__).parent / "serve"
    allowed = {f"maxstack.serve.{name}" for name in HOST}
    for name in HOST:
        strangers = {
            module
            for module in imports_of(folder / f"{name}.py") - allowed
            if module.split(".")[0] not in sys.stdlib_module_names
        }
        assert strangers == set(), name


def test_one_tenant_cannot_fill_the_queue():
    scheduler = Scheduler(replace(LIMITS, waiting=5, waiting_a_tenant=3))
    for i in range(3):
        scheduler.add(replace(asked(f"a{i}"), tenant="a"))
    with pytest.raises(Full, match="3 requests of this tenant are waiting"):
        scheduler.add(replace(asked("a3"), tenant="a"))
    scheduler.add(replace(asked("b0"), tenant="b"))
    scheduler.add(replace(asked("b1"), tenant="b"))
    with pytest.raises(Full, match="5 requests are waiting"):
        scheduler.add(replace(asked("c0"), tenant="c"))
    with pytest.raises(ValueError, match="waiting_a_tenant is 0"):
        replace(LIMITS, waiting_a_tenant=0)
