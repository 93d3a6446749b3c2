"""The pool of pages."""

import pytest

from maxstack.serve.pages import Pages


def test_pages_run_out_and_come_back():
    pages = Pages(3)
    assert [pages.take() for _ in range(4)] == [0, 1, 2, None]
    pages.release([1])
    assert pages.available == 1
    assert pages.take() == 1


def test_a_named_page_is_kept_and_the_longest_unused_goes_first():
    pages = Pages(3)
    taken = [pages.take() for _ in range(3)]
    for page in taken:
        pages.name(page)
    pages.release([2])
    pages.release([0, 1])  # 1 is let go before 0
    assert pages.census() == {"held": [], "kept": [2, 1, 0], "free": []}
    pages.share(2)
    assert [pages.take() for _ in range(3)] == [1, 0, None]


def test_a_shared_page_is_free_when_the_last_holder_lets_go():
    pages = Pages(1)
    page = pages.take()
    pages.share(page)
    pages.release([page])
    assert pages.available == 0
    pages.release([page])
    assert pages.available == 1


def test_pages_that_a_plan_may_touch_wait_for_it():
    pages = Pages(2)
    taken = [pages.take(), pages.take()]
    pages.release(taken, after=7)
    assert (pages.available, pages.coming) == (0, 2)
    pages.plan_done(6)
    assert pages.available == 0
    pages.plan_done(7)
    assert (pages.available, pages.coming) == (2, 0)


def test_letting_go_twice_is_an_error():
    pages = Pages(1)
    page = pages.take()
    pages.release([page])
    with pytest.raises(RuntimeError, match="page 0 is released, but nobody holds it"):
        pages.release([page])
