"""What is asked, what the device answers, what the caller hears."""

from dataclasses import dataclass
from typing import Any, NamedTuple

PRIORITIES = 100
"""Priorities are from -100 to 100: with no bound, one client could put everybody else off for ever."""


class Refused(ValueError):
    """The request can never be served under these limits; the message has the numbers."""


class Full(RuntimeError):
    """The queue is full, or the tenant's share of it. `retry_after` estimates the seconds after which half of the queue
    will be gone."""

    def __init__(self, waiting: int, retry_after: float, whose: str = ""):
        super().__init__(
            f"{waiting} requests{whose} are waiting, as many as may; try again in {retry_after:.0f} s"
        )
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Tokens to be continued. Times are seconds on the caller's monotonic clock."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    """Tokens to generate at most. With 0 the prompt is only read, and the request ends with its last chunk."""
    arrived: int | float
    deadline: int | float | None = None
    """The request ends then, finished or not, with the reason "deadline"."""
    priority: int = 0
    """Higher first. One level is worth `Limits.level_s` seconds of waiting."""
    tenant: str = ""
    adapter: str = ""
    """Pages of the prefix cache are shared by requests of the same tenant and adapter only."""
    use_cache: bool = True
    """False reads every token of the prompt anew, because something is wanted of each: log-probabilities, say."""
    stepwise: bool = False
    """One token a plan, the next one planned after the host saw it: the host makes a mask for each token."""
    params: Any = None
    """The engine's own, such as sampling parameters. The scheduler does not look."""

    def __post_init__(self):
        if not self.prompt:
            raise Refused(f"request {self.id}: the prompt is empty; it needs 1 token at least")
        if self.max_tokens < 0:
            raise Refused(f"request {self.id}: max_tokens is {self.max_tokens}; it must be 0 or more")
        if not -PRIORITIES <= self.priority <= PRIORITIES:
            raise Refused(
                f"request {self.id}: priority {self.priority} is not in {-PRIORITIES} … {PRIORITIES}"
            )


class Result(NamedTuple):
    """What a row brought in a plan: the tokens sampled, in order, none after the one that ended it."""

    tokens: tuple[int, ...] = ()
    ended: bool = False
    """The last token is a stop token."""
    error: str | None = None
    """What went wrong in this row alone (no finite logits, say). The request ends, and its pages are forgotten."""


class Event(NamedTuple):
    """New tokens of a request, or its end, or both."""

    id: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    """"stop", "length", "cancelled", "deadline", "error", or the reason that `cancel` was given."""
    error: str | None = None
    cached: int = 0
    """Tokens of the prompt that the prefix cache had."""
    admitted: int | float | None = None
    """When it was first given a row; None before."""
