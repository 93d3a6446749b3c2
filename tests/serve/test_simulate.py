"""Predictions: what can be said by hand is said right, and what is compared goes the right way."""

from dataclasses import replace
from random import Random
from statistics import mean

import pytest

from maxstack.serve.cost import CHIPS, Cost, transformer
from maxstack.serve.load import SHAREGPT_ANSWER, SHAREGPT_PROMPT, Lengths, Load
from maxstack.serve.plan import Limits
from maxstack.serve.simulate import Target, percentile, simulate

LIMITS = Limits(
    rows=32, page=16, pages=4096, max_length=2048, tokens_a_step=544, steps=(1, 4), waiting=10_000
)
# Weights 1 ms a step, 0.1 ms a hundred tokens of cache, products for nothing but 1 ms a thousand tokens.
PLAIN = Cost(
    weight_bytes=1e6, kv_bytes_a_token=1e3, flops_a_token=1e6, attention_flops_a_pair=0.0, bytes_a_second=1e9,
    flops_a_second=1e12,
)  # fmt: skip


def fixed(count: int) -> Lengths:
    return Lengths(mean=count, sigma=0)


def test_one_request_takes_the_time_of_its_steps():
    load = Load(requests=1, clients=1, prompt=fixed(100), answer=fixed(5))
    report = simulate(LIMITS, PLAIN, load)
    # Chunk of 100 tokens: 1e6 + 100·1e3 bytes. Then 4 tokens after 101, 102, 103 and 104 tokens.
    assert report.ttft_s[50] == pytest.approx(1.1e-3)
    assert report.e2e_s[50] == pytest.approx(1.1e-3 + sum(1e-3 + n * 1e-6 for n in (101, 102, 103, 104)))
    assert report.busy == pytest.approx(1.0)
    assert (report.output_tokens, report.prompt_tokens) == (5, 100)


def test_guesses_that_come_true_save_steps_and_others_cost():
    load = Load(requests=40, clients=4, prompt=fixed(32), answer=fixed(61))
    limits = replace(LIMITS, steps=(1,))
    plain = simulate(limits, PLAIN, load)
    guessing = replace(limits, drafts=3)
    all_true, none_true, some = (simulate(guessing, PLAIN, load, accepted=p) for p in (1.0, 0.0, 0.6))
    # One token with the prompt, then 60: one a step, or four.
    assert plain.tpot_s[50] / all_true.tpot_s[50] == pytest.approx(4, rel=0.05)
    assert none_true.tpot_s[50] == pytest.approx(plain.tpot_s[50], rel=0.05)
    # 1 + 0.6 + 0.36 + 0.216 tokens a step.
    assert plain.tpot_s[50] / some.tpot_s[50] == pytest.approx(2.18, rel=0.1)
    assert all_true.output_tokens == none_true.output_tokens == plain.output_tokens == 40 * 61
    with pytest.raises(ValueError, match="3 drafts"):
        simulate(guessing, PLAIN, load)


def test_lengths_have_their_mean_after_the_cut():
    random = Random(1)
    for lengths in (SHAREGPT_PROMPT, SHAREGPT_ANSWER):
        drawn = [lengths.draw(random) for _ in range(20_000)]
        assert mean(drawn) == pytest.approx(lengths.mean, rel=0.03)  # 3 standard errors are 2.2 %
        assert lengths.least <= min(drawn) <= max(drawn) <= lengths.most


def test_a_shared_beginning_saves_its_reading():
    load = Load(requests=100, clients=16, prompt=fixed(30), answer=fixed(8), shared=1024)
    limits = replace(LIMITS, max_length=4096)
    slow = replace(PLAIN, flops_a_second=1e10)
    with_cache = simulate(limits, slow, load)
    without = simulate(replace(limits, prefix_cache=False), slow, load)
    assert with_cache.hit_rate > 0.9
    assert without.hit_rate == 0
    assert with_cache.output_tokens_a_second > 5 * without.output_tokens_a_second


def test_more_clients_give_more_throughput_and_longer_waits():
    reports = [
        simulate(LIMITS, PLAIN, Load(requests=100, clients=clients, prompt=fixed(64), answer=fixed(32)))
        for clients in (1, 8, 32)
    ]
    rates = [report.output_tokens_a_second for report in reports]
    assert rates == sorted(rates)
    assert rates[2] > 4 * rates[0]
    assert [report.tpot_s[50] for report in reports] == sorted(report.tpot_s[50] for report in reports)


def test_a_rate_above_what_can_be_served_shows_in_the_goodput():
    target = Target(ttft_s=0.5, tpot_s=0.05)
    load = Load(requests=80, rate=5.0, prompt=fixed(64), answer=fixed(64))
    calm = simulate(LIMITS, PLAIN, load, target=target)
    assert calm.goodput == pytest.approx(calm.requests_a_second)
    rushed = simulate(LIMITS, replace(PLAIN, step_s=0.05), replace(load, rate=500.0), target=target)
    assert rushed.goodput < 0.5 * rushed.requests_a_second
    assert rushed.ttft_s[99] > 0.5


def test_a_small_cache_preempts_and_still_serves_all():
    tight = replace(LIMITS, pages=80, max_length=1024)
    load = Load(requests=60, clients=32, prompt=fixed(60), answer=fixed(100))
    report = simulate(tight, PLAIN, load)
    assert (report.served, report.output_tokens) == (60, 6000)
    assert report.preemptions > 0


def test_a_full_queue_turns_clients_away():
    limits = replace(LIMITS, rows=1, waiting=2, tokens_a_step=544)
    load = Load(requests=50, rate=1000.0, prompt=fixed(16), answer=fixed(50))
    report = simulate(limits, PLAIN, load)
    assert report.rejected > 0
    assert report.served + report.rejected == 50
    assert simulate(limits, PLAIN, replace(load, rate=None, clients=10, requests=12)).served == 12


def test_the_time_of_the_host_is_hidden_by_the_plan_ahead():
    load = Load(requests=20, clients=4, prompt=fixed(16), answer=fixed(64))
    limits = replace(LIMITS, steps=(1,))
    alone = simulate(limits, PLAIN, load)
    hidden = simulate(limits, PLAIN, load, host_s=0.5e-3)
    bare = simulate(replace(limits, ahead=1), PLAIN, load, host_s=0.5e-3)
    assert hidden.seconds < 1.1 * alone.seconds
    assert bare.seconds > 1.4 * alone.seconds


def test_a_simulation_repeats_itself():
    load = Load(requests=12, rate=20.0, max_tokens=1000)
    assert simulate(LIMITS, PLAIN, load) == simulate(LIMITS, PLAIN, load)
    assert simulate(LIMITS, PLAIN, load) != simulate(LIMITS, PLAIN, replace(load, seed=1))


def test_a_transformer_costs_what_its_sizes_say():
    # Llama-3-8B on one v6e, alone and at 256 tokens: 16.06 GB of weights at 1,640 GB/s.
    cost = transformer(
        CHIPS["v6e"], parameters=8.03e9, layers=32, heads=32, kv_heads=8, head_size=128, of_bandwidth=1.0
    )
    assert cost.kv_bytes_a_token == 131_072
    report = simulate(LIMITS, cost, Load(requests=1, clients=1, prompt=fixed(256), answer=fixed(2)))
    assert report.tpot_s[50] == pytest.approx((16.06e9 + 257 * 131_072) / 1640e9, rel=1e-6)


def test_percentiles_interpolate():
    assert [percentile([3.0, 1.0, 2.0], p) for p in (0, 50, 75, 100)] == [1.0, 2.0, 2.5, 3.0]
    assert percentile([], 50) == 0.0


def test_a_report_reads_well():
    table = simulate(LIMITS, PLAIN, Load(requests=5, clients=2)).table()
    assert "5 served, 0 rejected" in table
    assert "time to first token" in table
