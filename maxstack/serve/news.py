"""What the loop has to say: of requests to those who asked, of its progress to a watchdog."""

from dataclasses import dataclass

from maxstack.serve.embedding import Part
from maxstack.serve.errors import NotFinite, RequestFailed, StepFailed
from maxstack.serve.results import Logprobs


@dataclass(
    slots=True
)  # not frozen: that costs more than all the rest of making one, and there is one a token
class News:
    """What there is to tell of a request."""

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: list[Logprobs] | None = None
    prompt: tuple[int, list[Logprobs]] | None = None
    """A position of the prompt, and log-probabilities of its tokens from there on."""
    pooled: Part | None = None
    """What a chunk of the prompt adds to its embedding."""
    finish: str | None = None
    error: Exception | None = None
    cached: int = 0
    admitted: int | float | None = None
    """When it was given a row, on the engine's clock; None before."""


@dataclass
class Progress:
    """For a watchdog, which may read it from any thread."""

    steps: int = 0
    """Plans that are done."""
    busy_since: float | None = None
    """When the device was last given work or gave results, while there is some under way; None when it rests."""
    busy_s: float = 0.0
    """Seconds that the device has had work, up to the last result."""
    failed: int = 0
    """Steps that failed since the last one that did not."""

    def stuck_for(self, now: float) -> float:
        """Seconds that the device has been busy without a result; 0 when it rests."""
        since = self.busy_since
        return 0.0 if since is None else max(0.0, now - since)


def failure(text: str | None) -> RequestFailed:
    """The error of a request that the scheduler ended with one."""
    said = text or "the request failed"
    return NotFinite(said) if "finite" in said else StepFailed(said)
