"""The shape of the learning rate at named points."""

import math

import jax
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.optim import ScheduleConfig, learning_rate

PEAK, TOTAL = 2.0, 100
DECAY_OVER_20 = {"kind": "wsd", "final_fraction": 0.0, "decay_steps": 20}
NEAR = 1e-5  # float32, values up to 2


def at(step: int, **settings) -> float:
    return float(learning_rate(ScheduleConfig(**settings), PEAK, TOTAL)(step))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warmup_rises_evenly_to_the_peak_and_never_stands_at_zero(kind):
    rates = [at(step, kind=kind, warmup_steps=10) for step in range(11)]
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)], abs=NEAR)
    assert rates[10] == pytest.approx(PEAK if kind != "inverse_sqrt" else PEAK * math.sqrt(10 / 11), abs=NEAR)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_no_warmup_starts_at_the_peak(kind):
    assert at(0, kind=kind, warmup_steps=0) == pytest.approx(PEAK, abs=NEAR)


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"kind": "constant"}, {50: 1.0, 99: 1.0, 1000: 1.0}),
        ({"kind": "linear", "final_fraction": 0.0}, {20: 1.0, 60: 0.5, 99: 1 / 80, 100: 0.0, 500: 0.0}),
        ({"kind": "linear", "final_fraction": 0.2, "decay_steps": 40}, {59: 1.0, 60: 1.0, 80: 0.6, 100: 0.2}),
        ({"kind": "cosine", "final_fraction": 0.0}, {20: 1.0, 40: 0.5 + 0.5 * math.sqrt(0.5), 60: 0.5, 100: 0.0}),
        ({"kind": "cosine", "final_fraction": 0.1}, {60: 0.55, 100: 0.1, 500: 0.1}),
        ({"kind": "wsd", "final_fraction": 0.0, "decay_fraction": 0.4}, {20: 1.0, 59: 1.0, 80: 0.5, 100: 0.0}),
        (DECAY_OVER_20 | {"decay_shape": "sqrt"}, {80: 1.0, 85: 0.5, 100: 0.0}),
        (DECAY_OVER_20 | {"decay_shape": "cosine"}, {80: 1.0, 90: 0.5, 100: 0.0}),
        ({"kind": "inverse_sqrt", "final_fraction": 0.0}, {19: 1.0, 79: 0.5, 319: 0.25}),
        ({"kind": "inverse_sqrt", "final_fraction": 0.4}, {79: 0.5, 319: 0.4}),
    ],
)  # fmt: skip
def test_decay_passes_through_named_points(settings, points):
    got = {step: at(step, warmup_steps=20, **settings) / PEAK for step in points}
    assert got == pytest.approx(points, abs=NEAR)


def test_fractions_are_of_the_whole_run():
    config = ScheduleConfig(kind="wsd", warmup_fraction=0.1, decay_fraction=0.3)
    assert config.spans(200) == (20, 120, 60)


def test_it_is_a_function_of_traced_steps():
    rate = learning_rate(ScheduleConfig(kind="cosine", warmup_steps=7), PEAK, TOTAL)
    together = jax.jit(jax.vmap(rate))(np.arange(TOTAL, dtype=np.int32))
    # Compiled arithmetic may be fused: one unit in the last place of 2.
    np.testing.assert_allclose(together, [rate(step) for step in range(TOTAL)], rtol=0, atol=3e-7)
    assert together.dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 101}, "schedule.warmup_steps 101 is longer than the run of 100 steps"),
        (
            {"kind": "wsd", "warmup_steps": 60, "decay_steps": 50},
            "warm-up of 60 and decay of 50 steps do not fit",
        ),
        ({"kind": "inverse_sqrt", "warmup_steps": 0}, "inverse_sqrt needs a warm-up of at least 1 step"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_with_the_numbers(settings, message):
    with pytest.raises(UserError, match=message):
        learning_rate(ScheduleConfig(**settings), PEAK, TOTAL)


@pytest.mark.parametrize("field", ["warmup_fraction", "decay_fraction", "final_fraction"])
def test_fractions_outside_of_one_are_refused(field):
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match=rf"schedule\.{field} must be between 0 and 1, got {value}"):
            ScheduleConfig(**{field: value})


def test_negative_lengths_and_impossible_rates_are_refused():
    with pytest.raises(UserError, match=r"schedule\.warmup_steps must not be negative, got -1"):
        ScheduleConfig(warmup_steps=-1)
    with pytest.raises(UserError, match=r"optim\.peak_lr must be a positive number, got 0"):
        learning_rate(ScheduleConfig(), 0.0, TOTAL)
    with pytest.raises(UserError, match="steps 0"):
        learning_rate(ScheduleConfig(), PEAK, 0)
