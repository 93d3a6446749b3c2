"""Numbers for Prometheus, under vLLM's names with our prefix: the scheduler's own, read when somebody asks.

Names: docs.vllm.ai/en/stable/usage/metrics. Nothing is counted twice, and nothing here runs in the engine's thread.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from maxstack.serve import counters as names
from maxstack.serve.counters import Counters

PREFIX = "maxstack:"
GAUGES = {
    "num_requests_running": "Requests that have a row.",
    "num_requests_waiting": "Requests that wait for one.",
    "kv_cache_usage_perc": "Share of the cache's pages that somebody holds, 0 to 1.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had.",
    "prefix_cache_collisions": "Keys of pages that turned out to belong to other tokens.",
    "num_preemptions": "Requests that gave up their pages and were read again.",
    "prompt_tokens": "Tokens of prompts that were read.",
    "generation_tokens": "Tokens that were generated.",
    "spec_decode_num_draft_tokens": "Places for guesses in steps that had some.",
    "spec_decode_num_accepted_tokens": "Guesses that came true.",
    "plans": "Plans that the scheduler made.",
    "plan_tokens_dropped": "Tokens computed past the end of their sequence.",
    "replayed_tokens": "Tokens that rows said again after they were preempted, in invariant mode.",
    "chunk_padding_tokens": "Padding in the chunks of prompts.",
    "cache_losses": "Times the device lost the cache, and the engine began afresh.",
}
LABELLED = {
    "request_success": ("finished_reason", "Requests that ended, by reason."),
    "admission_rejections": ("reason", "Requests that were not taken, by reason."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "request_time_per_output_token_seconds": "Mean time of a request's tokens after the first.",
    "e2e_request_latency_seconds": "From arrival to the end.",
    "request_queue_time_seconds": "From arrival to a row.",
    "request_prefill_time_seconds": "From a row to the first token.",
    "request_decode_time_seconds": "From the first token to the end.",
    "request_inference_time_seconds": "From a row to the end.",
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Tokens of a request's answer.",
    "request_params_max_tokens": "Tokens that a request asked for at most.",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that the prefix cache did not have.",
    "iteration_tokens_total": "Tokens of a plan.",
}
NOT_SHOWN = {"weight_reads", "kv_tokens_read"}
"""They are in `read_bytes`."""
WINDOW_S = 30.0
"""The share of the bandwidth is that of about so many seconds."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What it takes to turn steps into bytes."""

    weight_bytes: int = 0
    kv_bytes_a_token: int | float = 0.0
    peak: int | float | None = None
    """Bytes a second of all devices; None where it is not known."""

    def read(self, counters: Counters) -> int | float:
        """Bytes read since the start, of weights and of the cache."""
        return counters.weight_reads * self.weight_bytes + counters.kv_tokens_read * self.kv_bytes_a_token


class Metrics(Collector):
    """Everything that is told to Prometheus."""

    def __init__(
        self, model: str, own: Callable[[], Iterator[Metric]], clock: Callable[[], float] = time.monotonic
    ):
        """`own` gives further numbers, of the operation as a whole."""
        self.registry = CollectorRegistry()
        self.engine: Any = None
        self.traffic = Traffic()
        self._model, self._own, self._clock = model, own, clock
        self._samples: deque[tuple[float, float, float]] = deque()
        self.http_requests = Counter(
            f"{PREFIX}http_requests", "Answers by route, method and status.", ("path", "method", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.http_seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds", "From the head of a request to the end of its answer.",
            ("path",), registry=self.registry, buckets=names.LONG_S,
        )  # fmt: skip
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def text(self) -> tuple[bytes, str]:
        """What is scraped, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """As prometheus-client has it."""
        yield from self._own()
        if self.engine is None:
            return
        counters: Counters = self.engine.scheduler.counters
        yield from of_counters(counters, self._model)
        yield from self._of_engine(counters)

    def _of_engine(self, counters: Counters) -> Iterator[Metric]:
        engine, model = self.engine, self._model
        yield _counter(
            "compilations_after_ready",
            "Programs compiled since ready: 0, or something is wrong.",
            model,
            engine.compilations,
        )
        yield _counter("engine_steps", "Plans that the device has done.", model, engine.progress.steps)
        yield _counter(
            "device_busy_seconds", "Time in which the device had work.", model, engine.progress.busy_s
        )
        yield _counter(
            "failed_steps", "Steps that failed; the engine began afresh.", model, counters.cache_losses
        )
        read = self.traffic.read(counters)
        yield _counter("read_bytes", "Bytes of weights and cache that steps had to read.", model, read)
        share = self.bandwidth_share(read, engine.progress.busy_s)
        if share is not None:
            yield _gauge(
                "memory_bandwidth_share",
                "Of the memory's peak, while the device had work; 0 to 1.",
                model,
                share,
            )
        limits = engine.limits
        told = {
            name: str(getattr(limits, name))
            for name in ("page", "pages", "rows", "max_length", "prefix_cache")
        }
        info = InfoMetricFamily(f"{PREFIX}cache_config", "The cache's sizes.", labels=("model_name",))
        info.add_metric((model,), told)
        yield info

    def bandwidth_share(self, read: int | float, busy_s: int | float) -> float | None:
        """What was read in the last while, over what could have been; None where the peak is not known."""
        if not self.traffic.peak:
            return None
        now, samples = self._clock(), self._samples
        samples.append((now, read, busy_s))
        while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        _, read_then, busy_then = samples[0] if len(samples) > 1 else (0.0, 0.0, 0.0)
        busy = busy_s - busy_then
        return (read - read_then) / busy / self.traffic.peak if busy > 0 else 0.0


def of_counters(counters: Counters, model: str) -> Iterator[Metric]:
    """The scheduler's numbers."""
    for name, what in GAUGES.items():
        yield _gauge(name, what, model, getattr(counters, name))
    for name, what in COUNTERS.items():
        yield _counter(name, what, model, getattr(counters, name))
    for name, (label, what) in LABELLED.items():
        family = CounterMetricFamily(PREFIX + name, what, labels=("model_name", label))
        for value, count in list(getattr(counters, name).items()):
            family.add_metric((model, value), count)
        yield family
    for name, what in HISTOGRAMS.items():
        histogram: names.Histogram = getattr(counters, name)
        family = HistogramMetricFamily(PREFIX + name, what, labels=("model_name",))
        bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
        family.add_metric(
            (model,), list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum
        )
        yield family


def _gauge(name: str, what: str, model: str, value: int | float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, what, labels=("model_name",))
    family.add_metric((model,), value)
    return family


def _counter(name: str, what: str, model: str, value: int | float) -> Metric:
    family = CounterMetricFamily(PREFIX + name, what, labels=("model_name",))
    family.add_metric((model,), value)
    return family


def shown() -> set[str]:
    """Fields of the scheduler's counters that are told."""
    return {*GAUGES, *COUNTERS, *LABELLED, *HISTOGRAMS}


def hidden() -> set[str]:
    """Those that are not."""
    return {field.name for field in fields(Counters)} - shown()
