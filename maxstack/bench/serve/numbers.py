"""From answers to the numbers that one compares."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from maxstack.bench.serve.answers import Answer
from maxstack.config import UserError
from maxstack.serve.simulate import PERCENTILES, percentile
from maxstack.serve.simulate import Report as Simulated

KINDS = {
    "ttft": "time to first token",
    "tpot": "time a token",
    "itl": "between pieces",
    "e2e": "end to end",
}


def goal(words: Sequence[str]) -> dict[str, float]:
    """A target from words like `ttft:200` (milliseconds). Raises UserError for others."""
    found = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = 0.0
        if name not in ("ttft", "tpot", "e2e") or not 0 < milliseconds < 1e9:
            raise UserError(
                f"--goodput {word}: write what is counted and its most milliseconds, as in ttft:200 tpot:50 (or e2e)"
            )
        found[name] = milliseconds / 1e3
    return found


@dataclass(kw_only=True)
class Report:
    """Seconds, tokens, requests."""

    what: str
    """Which server, or which chip is predicted."""
    requests: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    short: int = 0
    """Answers with fewer tokens than asked for."""
    percentiles_s: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind ("ttft", …), then "p50", "p90", "p99" and "mean"."""
    good_requests_per_s: float | None = None
    """That met the target, and did not fail."""
    target_s: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    """By kind."""
    examples: dict[str, str] = field(default_factory=dict)
    """What the server said, of each kind of error."""
    late_p99_s: float = 0.0
    """That requests were sent after their time."""
    client: dict[str, float] = field(default_factory=dict)
    """What the client itself takes."""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def requests_per_s(self) -> float:
        """Those answered, over the whole time."""
        return (self.requests - sum(self.errors.values())) / max(self.seconds, 1e-9)

    @property
    def output_tokens_per_s(self) -> float:
        """Over the whole time."""
        return self.output_tokens / max(self.seconds, 1e-9)

    @property
    def input_tokens_per_s(self) -> float:
        """Over the whole time, cached ones included."""
        return self.prompt_tokens / max(self.seconds, 1e-9)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rates = ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s")
        return asdict(self) | {name: getattr(self, name) for name in rates}

    def table(self) -> str:
        """For reading."""
        failed = sum(self.errors.values())
        lines = [
            f"{self.what}: {self.requests - failed} of {self.requests} requests answered in {self.seconds:.1f} s",
            f"{self.requests_per_s:.2f} requests/s, {self.input_tokens_per_s:.0f} input tokens/s "
            f"({self.cached_tokens / max(self.prompt_tokens, 1):.0%} cached), "
            f"{self.output_tokens_per_s:.1f} output tokens/s",
        ]
        if self.good_requests_per_s is not None:
            wanted = ", ".join(f"{name} ≤ {value * 1e3:g} ms" for name, value in self.target_s.items())
            lines.append(f"goodput {self.good_requests_per_s:.2f} requests/s ({wanted})")
        lines.append(" " * 24 + "".join(f"{name:>10}" for name in (*_names(), "mean")))
        for kind, values in self.percentiles_s.items():
            cells = (f"{values[name] * 1e3:>10.1f}" for name in (*_names(), "mean") if name in values)
            lines.append(f"{KINDS[kind]:<21} ms" + "".join(cells))
        if self.short:
            lines.append(f"{self.short} answers were shorter than asked for")
        lines += [f"{count} × {kind}: {self.examples.get(kind, '')}" for kind, count in self.errors.items()]
        if self.client:
            lines.append(_of_client(self.client, self.late_p99_s))
        return "\n".join(lines)


def _of_client(client: dict[str, float], late_s: float) -> str:
    return (
        f"client: {client['cpu_share']:.1%} of a core in this run, {client['piece_s'] * 1e6:.0f} µs a piece and "
        f"{client['first_s'] * 1e3:.2f} ms to a first token against a server that does nothing; "
        f"sent late by {late_s * 1e3:.1f} ms (p99)"
    )


def _names() -> list[str]:
    return [f"p{percent}" for percent in PERCENTILES]


def summary(values: list[float]) -> dict[str, float]:
    """Percentiles and mean; zeros of nothing."""
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return found | {"mean": sum(values) / max(len(values), 1)}


def report(what: str, answers: Sequence[Answer], target_s: dict[str, float]) -> Report:
    """The numbers of a run."""
    good = [answer for answer in answers if answer.error is None]
    first = min((answer.due for answer in answers), default=0.0)
    seconds = max((answer.ended for answer in answers), default=0.0) - first
    met = [a for a in good if all(getattr(a, f"{kind}_s") <= most for kind, most in target_s.items())]
    failed = [answer for answer in answers if answer.error is not None]
    return Report(
        what=what,
        requests=len(answers),
        seconds=seconds,
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        cached_tokens=sum(answer.cached_tokens for answer in good),
        output_tokens=sum(answer.output_tokens for answer in good),
        short=sum(answer.output_tokens < answer.asked for answer in good),
        percentiles_s={
            "ttft": summary([answer.ttft_s for answer in good]),
            "tpot": summary([answer.tpot_s for answer in good if answer.output_tokens > 1]),
            "itl": summary([gap for answer in good for gap in answer.itl_s]),
            "e2e": summary([answer.e2e_s for answer in good]),
        },
        good_requests_per_s=len(met) / max(seconds, 1e-9) if target_s else None,
        target_s=target_s,
        errors=dict(Counter(str(answer.error) for answer in failed)),
        examples={str(answer.error): answer.said[:200] for answer in reversed(failed)},
        late_p99_s=percentile([answer.late_s for answer in answers], 99),
    )


def predicted(what: str, found: Simulated, target_s: dict[str, float]) -> Report:
    """A simulation, in the form of a run."""
    kinds = {"ttft": found.ttft_s, "tpot": found.tpot_s, "itl": found.itl_s, "e2e": found.e2e_s}
    return Report(
        what=what,
        requests=found.served + found.rejected,
        seconds=found.seconds,
        prompt_tokens=found.prompt_tokens,
        cached_tokens=round(found.prompt_tokens * found.hit_rate),
        output_tokens=found.output_tokens,
        percentiles_s={
            kind: {f"p{percent}": value for percent, value in values.items()}
            for kind, values in kinds.items()
        },
        good_requests_per_s=found.goodput if target_s else None,
        target_s=target_s,
        errors={"status 429": found.rejected} if found.rejected else {},
        more={
            "busy": found.busy, "plans": found.plans, "preemptions": found.preemptions, "padding": found.padding,
        },
    )  # fmt: skip
