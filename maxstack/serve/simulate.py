"""The real scheduler on a clock that is computed: what a chip would give, before there is one.

    cost = transformer(CHIPS["v6e"], parameters=8.03e9, layers=32, heads=32, kv_heads=8, head_size=128)
    report = simulate(limits, cost, Load(requests=2000, rate=8.0))
    print(report.table())

Thousands of requests take seconds. What is predicted is the scheduler's doing (who waits, how full steps are, what the
prefix cache saves) and the roofline's; what a kernel misses of the roofline has to be put into the cost.
"""

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from random import Random

from maxstack.serve.cost import Cost
from maxstack.serve.load import Load
from maxstack.serve.plan import Limits, Plan
from maxstack.serve.request import Full, Request, Result
from maxstack.serve.scheduler import Scheduler

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a request must get to count for the goodput."""

    ttft_s: int | float
    """Time to the first token at most."""
    tpot_s: int | float
    """Mean time of each further token at most."""


@dataclass
class Times:
    """One request that was served."""

    arrived: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """Seconds between tokens, with how many tokens waited as long: those of one plan share its time."""

    def hear(self, now: float, tokens: int) -> None:
        """Tokens came."""
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(((now - self.last) / tokens, tokens))
        self.last = now
        self.tokens += tokens

    @property
    def tpot_s(self) -> float:
        """Mean seconds of each token after the first."""
        return (self.last - (self.first or 0.0)) / max(self.tokens - 1, 1)


def percentile(values: list[float], percent: int | float) -> float:
    """By linear interpolation between the two nearest; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers of a simulation, in seconds, tokens and requests."""

    served: int
    rejected: int
    """Told to come back because the queue was full."""
    seconds: float
    prompt_tokens: int
    """Of the requests, those that were in the prefix cache included."""
    output_tokens: int
    ttft_s: dict[int, float]
    """By percentile, as are the next three."""
    tpot_s: dict[int, float]
    itl_s: dict[int, float]
    """Between tokens. Those of a plan of several steps share its time evenly."""
    e2e_s: dict[int, float]
    goodput: float
    """Requests a second that met the target; 0 without one."""
    busy: float
    """Share of the time in which the device computed."""
    plans: int
    preemptions: int
    hit_rate: float
    """Prompt tokens found in the prefix cache, of all of them."""
    padding: float
    """Share of the tokens of chunks that was padding."""

    @property
    def requests_a_second(self) -> float:
        """Requests served, over the whole time."""
        return self.served / self.seconds

    @property
    def output_tokens_a_second(self) -> float:
        """Tokens generated, over the whole time."""
        return self.output_tokens / self.seconds

    def table(self) -> str:
        """For reading."""
        lines = [
            f"{self.served} served, {self.rejected} rejected, {self.seconds:.1f} s, {self.plans} plans, "
            f"{self.preemptions} preemptions",
            f"{self.requests_a_second:.2f} requests/s, {self.output_tokens_a_second:.0f} output tokens/s, "
            f"goodput {self.goodput:.2f} requests/s",
            f"device busy {self.busy:.0%}, prefix hits {self.hit_rate:.0%}, padding of chunks {self.padding:.0%}",
            " " * 24 + "".join(f"{f'p{p}':>10}" for p in PERCENTILES),
        ]
        for name, values in (
            ("time to first token", self.ttft_s),
            ("time a token", self.tpot_s),
            ("between tokens", self.itl_s),
            ("end to end", self.e2e_s),
        ):
            lines.append(f"{name:<21} ms" + "".join(f"{values[p] * 1e3:>10.1f}" for p in PERCENTILES))
        return "\n".join(lines)


class _Clients:
    """Requests by the time they come, and what became of them."""

    def __init__(self, load: Load):
        self.load = load
        self.random = Random(load.seed)
        self.left = load.requests
        self.rejected = 0
        self.answers: dict[str, int] = {}
        self.times: dict[str, Times] = {}
        self.said: dict[str, int] = {}
        """Tokens of each answer that the device has made."""
        self._asked: dict[str, Request] = {}
        self.coming: list[tuple[float, str]] = []  # a heap
        now = 0.0
        first = self.left if load.clients is None else min(load.clients, self.left)
        for _ in range(first):
            if load.rate is not None:
                now += self.random.expovariate(load.rate)
            self._make(now)
        heapify(self.coming)

    def _make(self, arrives: float) -> None:
        self.left -= 1
        name = f"{self.load.requests - self.left:08d}"
        own, answer = self.load.prompt.draw(self.random), self.load.answer.draw(self.random)
        serial = self.load.requests - self.left  # a token that no other prompt has
        self.answers[name] = answer
        self._asked[name] = Request(
            id=name, prompt=(0,) * self.load.shared + (serial,) * own, arrived=arrives,
            max_tokens=answer if self.load.max_tokens is None else max(answer, self.load.max_tokens),
        )  # fmt: skip
        heappush(self.coming, (arrives, name))

    def arrive(self, scheduler: Scheduler, now: float) -> None:
        """Everybody whose time has come. A client that is told to come back does so; others go away."""
        while self.coming and self.coming[0][0] <= now:
            _, name = heappop(self.coming)
            request = self._asked[name]
            try:
                scheduler.add(request)
            except Full as full:
                self.rejected += 1
                if self.load.clients is not None:
                    heappush(self.coming, (now + full.retry_after, name))
                continue
            self.times[name] = Times(request.arrived)
            del self._asked[name]

    def gained(self, plan: Plan, accepted: float) -> int:
        """Tokens that a row gains in a plan: one a step, and the guesses that come true."""
        total = plan.steps
        for _ in range(plan.steps if plan.drafts else 0):
            guesses = 0
            while guesses < plan.drafts and self.random.random() < accepted:
                guesses += 1
            total += guesses
        return total

    def next_one(self, now: float) -> None:
        """A client got its answer and asks again."""
        if self.load.clients is not None and self.left:
            self._make(now)


def simulate(
    limits: Limits, cost: Cost, load: Load, *, target: Target | None = None, host_s: float = 0.0,
    accepted: float | None = None,
) -> Report:  # fmt: skip
    """Serve a load. `host_s` is the time the host takes to make a plan; with `Limits.ahead` 2 the device hides it.

    With `Limits.drafts` a guess comes true with the chance `accepted`, if those before it did. They are made in no
    time, and at every step: whether they pay is what the simulation tells. Raises ValueError without that chance.
    """
    if limits.drafts and (accepted is None or not 0 <= accepted <= 1):
        raise ValueError(
            f"simulate: limits have {limits.drafts} drafts; accepted={accepted} must say how many come true (0 to 1)"
        )
    scheduler, clients = Scheduler(limits), _Clients(load)
    under_way: deque[tuple[Plan, float]] = deque()
    now = free_at = busy = 0.0
    while True:
        clients.arrive(scheduler, now)
        plan = scheduler.plan(now)
        if plan is not None:
            now += host_s
            seconds = cost.seconds(plan)
            busy += seconds
            free_at = max(now, free_at) + seconds
            under_way.append((plan, free_at))
        if under_way and (plan is None or len(under_way) == limits.ahead):
            plan, ends = under_way.popleft()
            now = max(now, ends)
            for event in scheduler.done(plan, _results(plan, clients, accepted or 0.0), now):
                if event.tokens:
                    clients.times[event.id].hear(now, len(event.tokens))
                if event.finish is not None:
                    clients.next_one(now)
        elif plan is None:
            if not clients.coming:
                return _report(scheduler, clients, now, busy, target)
            now = max(now, clients.coming[0][0])


def _results(plan: Plan, clients: _Clients, accepted: float) -> dict[int, Result]:
    """A row ends when its answer has the length that was drawn for it. The tokens themselves do not matter."""
    results, said = {}, clients.said
    for chunk in plan.chunks:
        if chunk.last:
            said[chunk.request.id] = chunk.end - len(chunk.request.prompt) + 1
            ended = said[chunk.request.id] >= clients.answers[chunk.request.id]
            results[chunk.row] = Result((1,), ended=ended)
    for decode in plan.decodes:
        name = decode.request.id
        left = clients.answers[name] - said[name]
        # Less than 1: it had ended when the plan was made, and nobody listens.
        count = min(decode.count, max(left, 1), clients.gained(plan, accepted))
        said[name] += count
        results[decode.row] = Result((1,) * count, ended=left <= count)
    return results


def _report(
    scheduler: Scheduler, clients: _Clients, seconds: float, busy: float, target: Target | None
) -> Report:
    times = list(clients.times.values())
    counters = scheduler.counters
    good = sum(
        t.first is not None and t.first - t.arrived <= target.ttft_s and t.tpot_s <= target.tpot_s
        for t in times
        if target is not None
    )
    gaps = [gap for t in times for gap, count in t.gaps for _ in range(count)]

    def percentiles(values: list[float]) -> dict[int, float]:
        return {p: percentile(values, p) for p in PERCENTILES}

    return Report(
        served=len(times),
        rejected=clients.rejected,
        seconds=seconds,
        prompt_tokens=counters.prefix_cache_queries or counters.prompt_tokens,
        output_tokens=sum(t.tokens for t in times),
        ttft_s=percentiles([t.first - t.arrived for t in times if t.first is not None]),
        tpot_s=percentiles([t.tpot_s for t in times if t.tokens > 1]),
        itl_s=percentiles(gaps),
        e2e_s=percentiles([t.last - t.arrived for t in times]),
        goodput=good / seconds,
        busy=busy / seconds,
        plans=counters.plans,
        preemptions=counters.num_preemptions,
        hit_rate=counters.prefix_cache_hits / max(counters.prefix_cache_queries, 1),
        padding=counters.chunk_padding_tokens
        / max(counters.chunk_padding_tokens + counters.prompt_tokens, 1),
    )
