"""What Prometheus is told: vLLM's names, the scheduler's numbers, and ours."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from maxstack.models.generation import SamplingParams
from maxstack.serve.operate.metrics import NOT_SHOWN, Metrics, Traffic, hidden
from maxstack.serve.operate.operation import Operation
from tests.serve.operate.pretend import engine

# docs.vllm.ai/en/stable/usage/metrics, those that have a meaning here.
VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits num_preemptions
prompt_tokens generation_tokens request_success time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
request_generation_tokens request_params_max_tokens request_prefill_kv_computed_tokens iteration_tokens_total
cache_config_info
""".split()
OURS = """
compilations_after_ready engine_steps failed_steps device_busy_seconds read_bytes memory_bandwidth_share
startup_seconds healthy ready draining engine_stalled_seconds build_info http_requests http_request_duration_seconds
""".split()


def families(metrics: Metrics) -> dict[str, dict[tuple, float]]:
    """Samples of each family, by name and labels."""
    text, _ = metrics.text()
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        name = family.name.removeprefix("maxstack:")
        found[name] = {
            (
                sample.name.removeprefix("maxstack:"),
                *(v for k, v in sorted(sample.labels.items()) if k != "model_name"),
            ): sample.value
            for sample in family.samples
        }
    return found


def test_every_name_is_there_and_every_number_of_the_scheduler_is_told():
    with engine() as (made, _):
        operation = Operation("tiny")
        operation.attach(made)
        operation.metrics.traffic = Traffic(weight_bytes=1, peak=1e9)
        found = families(operation.metrics)
        assert set(VLLM) | set(OURS) <= set(found)
        assert hidden() == NOT_SHOWN


def test_numbers_are_those_of_the_requests():
    with engine() as (made, _):
        operation = Operation("tiny")
        operation.attach(made)
        operation.metrics.traffic = Traffic(weight_bytes=1000, kv_bytes_a_token=10, peak=1e9)
        params = SamplingParams(max_tokens=5, temperature=0.0)
        asyncio.run(made.generate([[1, 2, 3], [4, 5, 6, 7, 8, 9]], params))
        found = families(operation.metrics)
        assert found["prompt_tokens"][("prompt_tokens_total",)] == 9
        assert found["generation_tokens"][("generation_tokens_total",)] == 10
        assert found["request_success"][("request_success_total", "length")] == 2
        ttft = found["time_to_first_token_seconds"]
        assert (
            ttft[("time_to_first_token_seconds_count",)]
            == ttft[("time_to_first_token_seconds_bucket", "+Inf")]
            == 2
        )
        sizes = found["request_prompt_tokens"]
        assert (
            sizes[("request_prompt_tokens_bucket", "2.0")],
            sizes[("request_prompt_tokens_bucket", "5.0")],
        ) == (0, 1)
        assert sizes[("request_prompt_tokens_sum",)] == 9
        counters = made.scheduler.counters
        read = counters.weight_reads * 1000 + counters.kv_tokens_read * 10
        assert found["read_bytes"][("read_bytes_total",)] == read > 5000
        # Each row decodes its last four tokens at lengths of at least its prompt.
        assert counters.kv_tokens_read >= 4 * 9


def test_the_share_of_the_bandwidth_is_that_of_the_last_while():
    now = [0.0]
    metrics = Metrics("tiny", lambda: iter(()), clock=lambda: now[0])
    assert metrics.bandwidth_share(1e9, 1.0) is None
    metrics.traffic = Traffic(weight_bytes=1, peak=1e9)
    assert metrics.bandwidth_share(5e8, 1.0) == 0.5
    now[0] = 20.0
    assert metrics.bandwidth_share(5e8 + 2e9, 11.0) == 0.2
    now[0] = 60.0  # what was half a minute ago counts no more
    assert metrics.bandwidth_share(2.5e9 + 9e9, 21.0) == 0.9
    now[0] = 61.0
    assert metrics.bandwidth_share(2.5e9 + 9e9, 21.0) == 0.9
