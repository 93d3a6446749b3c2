"""Requests, plans, results and failures in any order: pages, order, budget, and each request's answer."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.serve.machine import Serving

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_any_order_of_events_keeps_the_pages_and_the_answers():
    run_state_machine_as_test(Serving, settings=settings(max_examples=12, stateful_step_count=40, **COMMON))


@pytest.mark.slow
def test_ten_thousand_steps_keep_the_pages_and_the_answers():
    run_state_machine_as_test(Serving, settings=settings(max_examples=200, stateful_step_count=50, **COMMON))
