"""Requests, plans, results and failures in any order: pages, order, budget, and each request's answer."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from maxstack.serve.pages import Pages
from maxstack.serve.plan import Limits
from maxstack.serve.prefix import Prefix, digest
from maxstack.serve.scheduler import Scheduler
from maxstack.serve.sequence import Sequence
from tests.serve import test_scheduler as examples
from tests.serve.machine import INVARIANT, Serving

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def weak(data: bytes) -> bytes:
    """A hash with two values: everything collides."""
    return bytes([digest(data)[0] % 2])


class Colliding(Scheduler):
    """The scheduler with a hash that is worth nothing."""

    def __init__(self, limits):
        super().__init__(limits)
        self.prefix = Prefix(self.pages, limits.page, hashed=weak)


class ServingWithCollisions(Serving):
    scheduler_class = Colliding


class ServingInvariant(Serving):
    choices = INVARIANT


def test_any_order_of_events_keeps_the_pages_and_the_answers():
    run_state_machine_as_test(Serving, settings=settings(max_examples=12, stateful_step_count=30, **COMMON))


def test_colliding_hashes_share_nothing_that_differs():
    run_state_machine_as_test(
        ServingWithCollisions, settings=settings(max_examples=3, stateful_step_count=30, **COMMON)
    )


def test_in_invariant_mode_every_token_is_computed_in_one_way():
    run_state_machine_as_test(
        ServingInvariant, settings=settings(max_examples=6, stateful_step_count=30, **COMMON)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Serving, ServingInvariant])
def test_ten_thousand_steps_keep_the_pages_and_the_answers(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, **COMMON))


# ------------------------------------------------------------------------------------------------- planted bugs
def _released_while_written(patch):
    release = Pages.release
    patch.setattr(Pages, "release", lambda self, pages, after=None: release(self, pages))


def _hash_believed(patch):
    patch.setattr(Serving, "scheduler_class", Colliding)
    patch.setattr(Prefix, "_same", lambda self, node, parent, salt, tokens: True)


def _budget_off_by_one(patch):
    budget = Scheduler._budget
    patch.setattr(Scheduler, "_budget", lambda self, batch: budget(self, batch) + 1)


def _freed_twice_on_cancel(patch):
    finish = Scheduler._finish

    def twice(self, sequence, reason, now=None):
        pages = list(sequence.pages)
        finish(self, sequence, reason, now)
        if reason == "cancelled":
            for page in pages:
                self.pages.refs[page] or self.pages._free.append(page)

    patch.setattr(Scheduler, "_finish", twice)


def _old_results_taken(patch):
    place = Scheduler._place

    def without_epoch(self, sequence, found, now):
        place(self, sequence, found, now)
        sequence.epoch = 1

    patch.setattr(Scheduler, "_place", without_epoch)


def _named_too_early(patch):
    patch.setattr(Sequence, "settled", property(lambda self: max(self.computed, len(self.tokens))))


def _adapters_share(patch):
    patch.setattr(Prefix, "salt", lambda self, tenant, adapter: repr((tenant, "")).encode())


def _whole_prompt_from_the_cache(patch):
    match = Prefix.match
    patch.setattr(
        Prefix, "match", lambda self, keys, salt, tokens, most: match(self, keys, salt, tokens, len(keys))
    )


def _table_not_sent(patch):
    grow = Scheduler._grow

    def silent(self, sequence, positions, batch):
        dirty = sequence.dirty
        grown = grow(self, sequence, positions, batch)
        sequence.dirty = dirty
        return grown

    patch.setattr(Scheduler, "_grow", silent)


def _evicted_with_its_name(patch):
    def only_the_page(self, page):
        del self._kept[page]
        self._free.append(page)

    init = Scheduler.__init__

    def built(self, limits):
        init(self, limits)
        self.pages.on_evict = lambda page: only_the_page(self.pages, page)

    patch.setattr(Scheduler, "__init__", built)


def _first_in_order_gives_way(patch):
    preempt = Scheduler._preempt

    def wrong(self, sequence, batch):
        preempt(self, self._running[0], batch)

    patch.setattr(Scheduler, "_preempt", wrong)


def _cancelled_result_heard(patch):
    finish = Scheduler._finish

    def unmarked(self, sequence, reason, now=None):
        finish(self, sequence, reason, now)
        sequence.finished = False

    patch.setattr(Scheduler, "_finish", unmarked)


def _promise_kept_for_ever(patch):
    leave = Scheduler._leave

    def forgetful(self, sequence):
        promised = {key: s for key, s in self._promised.items() if s is sequence}
        leave(self, sequence)
        self._promised.update(promised)

    patch.setattr(Scheduler, "_leave", forgetful)


def _last_come_first_served(patch):
    patch.setattr(Scheduler, "_admit", _reversed_queue(Scheduler._admit))


def _reversed_queue(admit: Callable) -> Callable:
    def wrong(self, batch, now):
        self._waiting.reverse()
        admit(self, batch, now)
        self._waiting.sort(key=lambda s: s.order)

    return wrong


def _without_invariance(method: str) -> Callable:
    """One of the scheduler's methods goes by limits that ask for no invariance."""

    def bug(patch):
        right = getattr(Scheduler, method)

        def wrong(self, *args):
            limits = self.limits
            self.limits = replace(limits, invariant=False)
            try:
                return right(self, *args)
            finally:
                self.limits = limits

        patch.setattr(Scheduler, method, wrong)

    bug.__name__ = method
    return bug


def _hits_of_less_than_a_chunk(patch):
    patch.setattr(Limits, "pages_at_once", 1)


@pytest.mark.parametrize(
    ("bug", "example"),
    [
        (_old_results_taken, examples.test_results_from_before_a_restart_are_dropped),
        (_whole_prompt_from_the_cache, examples.test_the_last_token_of_a_prompt_is_always_computed),
        (
            _released_while_written,
            examples.test_pages_of_a_cancelled_request_are_its_own_until_the_plan_is_done,
        ),
        (
            _without_invariance("_read"),
            examples.test_in_invariant_mode_a_prompt_waits_for_pages_rather_than_having_a_chunk_cut,
        ),
        (
            _without_invariance("_place"),
            examples.test_in_invariant_mode_an_answer_is_said_again_and_told_once,
        ),
    ],
)
def test_an_example_finds_a_planted_bug(bug, example, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever notices it first
        example()


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [
        _released_while_written, _hash_believed, _budget_off_by_one, _freed_twice_on_cancel,
        _named_too_early, _adapters_share, _table_not_sent, _evicted_with_its_name,
        _first_in_order_gives_way, _cancelled_result_heard, _promise_kept_for_ever, _last_come_first_served,
    ],
    ids=lambda bug: bug.__name__.strip("_"),
)  # fmt: skip
def test_a_planted_bug_is_found(bug, monkeypatch):
    check_found(Serving, bug, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    # Answers are read again like prompts; or their pages are shared; or hits are parts of chunks.
    [
        _without_invariance("_place"), _without_invariance("_name_pages"), _hits_of_less_than_a_chunk,
    ],
    ids=lambda bug: bug.__name__.strip("_"),
)  # fmt: skip
def test_each_rule_of_invariant_mode_is_needed(bug, monkeypatch):
    check_found(ServingInvariant, bug, monkeypatch)


def check_found(machine, bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever notices it first
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=100, stateful_step_count=50, phases=[Phase.generate], database=None,
                derandomize=True, report_multiple_bugs=False, print_blob=False, **COMMON,
            ),
        )  # fmt: skip
