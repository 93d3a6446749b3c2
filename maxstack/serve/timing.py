"""Times of requests, for the histograms."""

from maxstack.serve.counters import Counters
from maxstack.serve.sequence import Sequence


def time_tokens(counters: Counters, sequence: Sequence, count: int, now: int | float) -> None:
    """Tokens of a sequence came."""
    before = sequence.last_token
    if before is None:
        sequence.first_token = now
        counters.time_to_first_token_seconds.observe(now - sequence.request.arrived)
    else:
        counters.inter_token_latency_seconds.observe((now - before) / count, count)
    sequence.last_token = now
    counters.generation_tokens += count


def time_request(counters: Counters, sequence: Sequence, now: int | float) -> None:
    """A request is over."""
    request = sequence.request
    counters.e2e_request_latency_seconds.observe(now - request.arrived)
    counters.request_prompt_tokens.observe(len(request.prompt))
    counters.request_generation_tokens.observe(sequence.generated)
    counters.request_params_max_tokens.observe(request.max_tokens)
    if sequence.admitted is None:
        return
    counters.request_prefill_kv_computed_tokens.observe(len(request.prompt) - sequence.cached)
    counters.request_queue_time_seconds.observe(sequence.admitted - request.arrived)
    counters.request_inference_time_seconds.observe(now - sequence.admitted)
    first = now if sequence.first_token is None else sequence.first_token
    counters.request_prefill_time_seconds.observe(first - sequence.admitted)
    counters.request_decode_time_seconds.observe(now - first)
    if sequence.generated > 1:
        counters.request_time_per_output_token_seconds.observe((now - first) / (sequence.generated - 1))
