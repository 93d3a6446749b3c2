"""What the scheduler counts, under the names of vLLM's metrics without their prefix. Plain numbers.

Names: docs.vllm.ai/en/stable/usage/metrics. Counters are exposed with `_total` behind them.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

SHORT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
LONG_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """Counts of values by bucket, each bucket up to and with its bound; the last one has none."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[int | float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: int | float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)


def _histogram(bounds: tuple[int | float, ...]):
    return field(default_factory=lambda: Histogram(bounds))


@dataclass
class Counters:
    """Numbers since the start. The scheduler writes them, anybody reads them."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
    """Share of the pages that somebody holds, 0 to 1. Pages kept for later requests are not counted."""

    prefix_cache_queries: int = 0
    """Prompt tokens of requests that may use the cache, counted when they start."""
    prefix_cache_hits: int = 0
    """Those that were there."""
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Tokens read, those of a prompt and those read again after a preemption."""
    generation_tokens: int = 0
    request_success: dict[str, int] = field(default_factory=dict)
    """Requests that ended, by reason (label `finished_reason`)."""
    admission_rejections: dict[str, int] = field(default_factory=dict)
    """Requests that were not taken (label `reason`): "full" or "refused"."""

    time_to_first_token_seconds: Histogram = _histogram(SHORT_S)
    inter_token_latency_seconds: Histogram = _histogram(TOKEN_S)
    """Tokens of one plan come together; each counts an equal share of the time since the plan before."""
    request_time_per_output_token_seconds: Histogram = _histogram(TOKEN_S)
    e2e_request_latency_seconds: Histogram = _histogram(LONG_S)
    request_queue_time_seconds: Histogram = _histogram(LONG_S)
    request_prefill_time_seconds: Histogram = _histogram(LONG_S)
    request_decode_time_seconds: Histogram = _histogram(LONG_S)
    request_inference_time_seconds: Histogram = _histogram(LONG_S)
    request_prompt_tokens: Histogram = _histogram(TOKENS)
    request_generation_tokens: Histogram = _histogram(TOKENS)
    request_params_max_tokens: Histogram = _histogram(TOKENS)
    request_prefill_kv_computed_tokens: Histogram = _histogram(TOKENS)
    """Prompt tokens that were not in the prefix cache."""
    iteration_tokens_total: Histogram = _histogram(STEP_TOKENS)

    spec_decode_num_draft_tokens: int = 0
    """Places for guesses in steps that had some."""
    spec_decode_num_accepted_tokens: int = 0
    """Guesses that came true."""

    # Ours alone.
    plans: int = 0
    weight_reads: int = 0
    """Steps, each of which reads the weights: those that decode, and one for a plan's chunks."""
    kv_tokens_read: int = 0
    """Tokens whose keys and values steps that decode have read, counted by the rows' lengths when they were planned."""
    plan_tokens_dropped: int = 0
    """Tokens computed for sequences that had ended by then, or were given up."""
    replayed_tokens: int = 0
    """Tokens that rows said again after a preemption, in invariant mode."""
    chunk_padding_tokens: int = 0
    """Of the tokens of chunks, those that were padding."""
    prefix_cache_collisions: int = 0
    """Keys of pages that turned out to belong to other tokens."""
    cache_losses: int = 0
    """Times the device lost the cache."""
