"""How the largest size is looked for: exact where it says so, in few trials, and never where it need not be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnx_fit import ConfigurationError
from nnx_fit.callbacks.batch_size_search import Found, largest_that_fits


def search(capacity: float, start: int = 2, **options):
    """What is found in a memory of some capacity, and which sizes were tried."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    return largest_that_fits(fits, start, **options), tried


@given(capacity=st.integers(1, 10_000), start=st.integers(1, 10_000))
def test_binsearch_finds_the_capacity_itself(capacity, start):
    found, tried = search(capacity, start, mode="binsearch", max_trials=60)
    assert found == Found(capacity, capacity + 1)
    assert len(tried) == len(set(tried)) <= 2 * math.log2(max(capacity, start) + 1) + 3


@given(capacity=st.integers(1, 10_000), start=st.integers(1, 10_000))
def test_power_ends_between_the_capacity_and_half_of_it(capacity, start):
    found, tried = search(capacity, start, mode="power", max_trials=60)
    assert found.size <= capacity < found.too_large
    assert found.size > capacity / 4  # halving rounds down; from a start that fits it is never below one half
    assert start > capacity or found.size > capacity / 2
    assert len(tried) == len(set(tried))


@given(capacity=st.integers(1, 1000), start=st.integers(1, 1000), mode=st.sampled_from(["power", "binsearch"]))
def test_what_is_larger_than_a_failure_is_never_tried(capacity, start, mode):
    _, tried = search(capacity, start, mode=mode, max_trials=60)
    for place, size in enumerate(tried):
        failures = [earlier for earlier in tried[:place] if earlier > capacity]
        assert all(size < failure for failure in failures)


def test_the_sizes_that_lightning_tries():
    """By hand from its `_run_power_scaling` and `_run_binary_scaling`, for room for 10: there, too, 8 and 10."""
    assert search(10)[1] == [2, 4, 8, 16]
    assert search(10)[0].size == 8
    assert search(10, mode="binsearch")[1] == [2, 4, 8, 16, 12, 10, 11]
    assert search(10, mode="binsearch")[0].size == 10


def test_a_start_that_is_too_large_is_halved():
    assert search(5, 32)[1] == [32, 16, 8, 4]
    assert search(5, 32)[0].size == 4


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_growth_ends_at_the_limit_which_is_tried_itself(mode):
    found, tried = search(math.inf, mode=mode, limit=lambda: 100)
    assert tried == [2, 4, 8, 16, 32, 64, 100]
    assert found == Found(100, None)


def test_a_limit_that_shows_after_the_first_trial_counts():
    tried: list[int] = []
    found = largest_that_fits(lambda size: tried.append(size) is None, 2, limit=lambda: 5 if tried else math.inf)
    assert (found.size, tried) == (5, [2, 4, 5])


def test_the_start_is_within_the_limit():
    assert search(math.inf, 64, limit=lambda: 10)[1] == [10]


def test_trials_are_counted():
    found, tried = search(math.inf, max_trials=3)
    assert (found, tried) == (Found(8, None), [2, 4, 8])


def test_nothing_that_fits_is_an_error_that_tells_how_far_the_search_went():
    with pytest.raises(ConfigurationError, match=r"smallest that was tried is 1\.\nFix: make the model"):
        search(0)
    with pytest.raises(ConfigurationError, match=r"smallest that was tried is 8\.\nFix: start lower"):
        search(4, 16, max_trials=2)
