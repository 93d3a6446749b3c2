import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import UserError
from maxstack.data.config import DataConfig, MixtureStage, SourceConfig
from maxstack.data.mixture import Mixture, mixture


def data(*weights: float, stages: tuple[MixtureStage, ...] = ()) -> DataConfig:
    sources = tuple(SourceConfig(name=f"s{i}", path="x", weight=w) for i, w in enumerate(weights))
    return DataConfig(sources=sources, stages=stages)


def counts(mixed: Mixture, steps: int) -> np.ndarray:
    """Rows of each source in each step."""
    return np.array([np.bincount(mixed.step_rows(s)[0], minlength=len(mixed.names)) for s in range(steps)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 60),
)
def test_each_source_gives_its_rows_in_order_and_its_share(weights, batch_rows, seed, steps):
    mixed = mixture(dataclasses.replace(data(*weights), seed=seed), batch_rows)
    seen: list[list[int]] = [[] for _ in weights]
    for step in range(steps):
        sources, rows = mixed.step_rows(step)
        assert len(sources) == batch_rows
        for j in range(len(weights)):
            seen[j] += sorted(rows[sources == j].tolist())
        total = (step + 1) * batch_rows
        for j, weight in enumerate(weights):
            # One row for rounding its own share, and its share of what the others round.
            assert abs(len(seen[j]) - total * weight / sum(weights)) <= 2
    assert all(rows == list(range(len(rows))) for rows in seen)


def test_a_step_is_the_same_asked_alone_or_in_turn():
    mixed = mixture(data(5.0, 3.0, 1.5), 8)
    steps = [mixed.step_rows(s) for s in range(50)]
    for step in (49, 0, 17, 18):
        again = mixture(data(5.0, 3.0, 1.5), 8).step_rows(step)
        assert all(np.array_equal(a, b) for a, b in zip(again, steps[step], strict=True))


def test_a_step_far_into_the_run_is_found_at_once_and_exactly():
    mixed = mixture(data(5.0, 3.0, 1.5, 0.001), 1024)
    start = time.perf_counter()
    before = mixed.rows_before(10**6)
    assert time.perf_counter() - start < 1
    assert sum(before) == 1024 * 10**6
    for found, weight in zip(before, (5, 3, 1.5, 0.001), strict=True):
        assert abs(found - 1024 * 10**6 * weight / 9.501) <= 2


def test_weights_change_at_their_steps():
    stages = (
        MixtureStage(step=10, weights={"s1": 1.0}),
        MixtureStage(step=20, weights={"s0": 1.0, "s1": 3.0}),
    )
    found = counts(mixture(data(1.0, 0.0, stages=stages), 8), 40)
    assert found[:10].tolist() == [[8, 0]] * 10
    # A row that was due to s0 before the border may come right after it.
    assert abs(found[10:20].sum(0) - [0, 80]).max() <= 1
    assert abs(found[20:].sum(0) - [40, 120]).max() <= 2


def test_weights_ramp():
    stages = (MixtureStage(step=100, weights={"s1": 1.0}, ramp_steps=100),)
    mixed = mixture(data(1.0, 0.0, stages=stages), 16)
    found = counts(mixed, 250)[:, 1] / 16
    assert found[:100].sum() == 0
    assert found[205:].min() == 1
    # The mean of ten steps of a line from 0 to 1; 64 level pieces and whole rows stay within 2 %.
    for start in range(100, 200, 10):
        assert found[start : start + 10].mean() == pytest.approx((start - 95) / 100, abs=0.02)
    assert mixed.weights(150)["s1"] == pytest.approx(0.5, abs=1 / 64)


def test_sources_are_spread_over_a_batch():
    """Each half of a batch, as two processes would read it, has its part of both sources."""
    mixed = mixture(data(1.0, 1.0), 16)
    halves = np.array([mixed.step_rows(s)[0][:8].sum() for s in range(200)])
    # Hypergeometric: mean 4, variance 16/15; the mean over 200 steps has sigma 0.073.
    assert abs(halves.mean() - 4) < 0.3
    assert len(set(halves.tolist())) > 3


@pytest.mark.parametrize(
    ("weights", "stages", "words"),
    [
        ((0, 0), (), "weights of all sources are 0 from step 0"),
        ((1, 1), (MixtureStage(step=5, weights={}),), "weights of all sources are 0 from step 5"),
        ((1, 1), (MixtureStage(step=5, weights={"sO": 1.0}),), r"names \['sO'\]; sources are \['s0', 's1'\]"),
        ((1, 1), (MixtureStage(step=5, weights={"s0": -1.0, "s1": 2.0}),), "must not be negative"),
        (
            (1, 1),
            (
                MixtureStage(step=5, weights={"s0": 1.0}, ramp_steps=10),
                MixtureStage(step=9, weights={"s0": 1.0}),
            ),
            "step 9 begins before the one before it ends",
        ),
    ],
)
def test_impossible_mixtures_are_refused(weights, stages, words):
    with pytest.raises(UserError, match=words):
        mixture(data(*map(float, weights), stages=stages), 8)
