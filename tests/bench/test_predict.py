"""`maxstack bench serve --simulate`: a chip's numbers from the model's sizes, and from the step compiled for it."""

import importlib.util
import json
from pathlib import Path

import pytest

from maxstack.bench.command import main
from maxstack.bench.serve.compiled_step import PAGES, Step, compiled_step, cost_of
from maxstack.bench.serve.predict import config_of, formula, limits_on
from maxstack.config import UserError
from maxstack.models import llama
from maxstack.serve.cost import CHIPS

LLAMA = str(Path(__file__).parents[2] / "configs/pretrain/llama3_8b.py")
SMALL = llama(
    vocab_size=1024, width=512, depth=3, heads=4, kv_heads=2, head_size=128, feed_forward=1024, max_length=2048
)  # fmt: skip


def test_a_model_costs_what_its_sizes_say():
    cost = formula(config_of(LLAMA), "v6e")
    assert cost.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert cost.kv_bytes_a_token == 2 * 32 * 8 * 128 * 2
    assert cost.attention_flops_a_pair == 4 * 32 * 32 * 128
    # The table of tokens is looked up, not multiplied with.
    assert cost.flops_a_token == pytest.approx(2 * (8.03e9 - 128_256 * 4096), rel=1e-3)


def test_the_cache_gets_the_memory_that_is_left():
    limits = limits_on(config_of(LLAMA), "v6e")
    free = 0.85 * (32 * 2**30 - 16.06e9)
    assert limits.pages == pytest.approx(free / (128 * 131_072), rel=1e-2)
    with pytest.raises(UserError, match=r"16\.1 GB of weights"):
        limits_on(config_of(LLAMA), "v5e")


def test_a_prediction_has_the_form_of_a_measurement(tmp_path, capsys):
    words = ["serve", "--simulate", "h100", "--model", LLAMA, "--rate", "4", "--requests", "30"]
    assert main([*words, "--goodput", "ttft:1000", "--json", f"{tmp_path}/a.json"]) == 0
    row = json.loads((tmp_path / "a.json").read_text())
    assert row["requests"] == 30
    assert row["good_requests_per_s"] == pytest.approx(row["requests_per_s"])
    assert 0 < row["percentiles_s"]["tpot"]["p50"] < row["percentiles_s"]["e2e"]["p99"]
    assert "time to first token" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["x100"], ["h100", "--goodput", "e2e:9"]])
def test_what_cannot_be_predicted_is_refused(words):
    with pytest.raises(UserError):
        main(["serve", "--simulate", *words, "--model", LLAMA, "--requests", "1"])


def test_a_compiled_step_is_split_into_cache_and_the_rest():
    plain = formula(SMALL, "v6e")
    step = Step(4 * 5e6 + 4 * PAGES * 128 * plain.attention_flops_a_pair, 900_000)
    cost = cost_of(step, plain, CHIPS["v6e"], 4, of_bandwidth=0.5, of_products=0.25)
    assert cost.weight_bytes == 900_000
    assert cost.flops_a_token == pytest.approx(5e6)
    assert cost.bytes_a_second == CHIPS["v6e"].bytes_a_second / 2


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu package")
def test_the_compiler_counts_what_the_sizes_say():
    step, plain = compiled_step(SMALL, "v6e", 8, "bfloat16"), formula(SMALL, "v6e")
    cost = cost_of(step, plain, CHIPS["v6e"], 8, of_bandwidth=1.0, of_products=1.0)
    assert step.weight_bytes == pytest.approx(plain.weight_bytes, rel=0.01)
    assert cost.flops_a_token == pytest.approx(plain.flops_a_token, rel=0.1)  # norms, rotation, sampling
