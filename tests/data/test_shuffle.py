import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from maxstack.data.shuffle import Permutation, derive_key


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_index_has_one_image(n, key):
    assert sorted(Permutation(n, key)(np.arange(n))) == list(range(n))


def test_an_index_alone_has_the_image_it_has_among_others():
    permutation = Permutation(10**12, 7)
    indices = np.array([0, 5, 10**11, 10**12 - 1])
    assert [int(permutation(np.array([i]))[0]) for i in indices] == permutation(indices).tolist()


def test_the_order_is_the_same_on_every_machine():
    # Written down once; a change here changes the order of every run and voids every checkpoint's position.
    assert Permutation(10, derive_key(0, "plays", "rows", 1))(np.arange(10)).tolist() == [
        8,
        9,
        6,
        3,
        4,
        1,
        2,
        5,
        7,
        0,
    ]
    assert derive_key(1, "a") != derive_key("1a") != derive_key(1, "b")


@pytest.mark.parametrize("n", [2, 3, 5, 42])
def test_over_keys_every_image_is_as_likely(n):
    keys = 40 * n
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, derive_key(key))(np.arange(n))] += 1
    statistic = ((counts - 40) ** 2 / 40).sum()
    # (n-1)² degrees of freedom; a fair order fails this once in 10⁶, and the keys are fixed.
    assert statistic < chi2.ppf(1 - 1e-6, (n - 1) ** 2)


def test_neighbours_do_not_stay_neighbours():
    image = Permutation(10_000, 3)(np.arange(10_000))
    # By chance 2 of 10,000 neighbours stay together; 12 is beyond a Poisson(2)'s 10⁻⁶.
    assert (np.abs(np.diff(image)) == 1).sum() < 12
