"""Summaries: bins, moments and drifts equal what NumPy says of the same arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.callbacks.summaries import BINS, DRIFT, MEAN, ROW, STD, UNKNOWN, histograms, scale_of, summarize

MOMENTS = ("num", "min", "max", "sum", "sum_squares", "mean", "std")


def rows_of(*arrays, previous=None, **options):
    given = {place: jnp.asarray(array) for place, array in (previous or {}).items()}
    return np.asarray(summarize([jnp.asarray(array) for array in arrays], given, **options), np.float64)


def summary_of(*arrays):
    return [dict(zip(MOMENTS, row[BINS:], strict=False)) | {"counts": row[:BINS]} for row in rows_of(*arrays)]


def histogram_of(array):
    return histograms(["x"], rows_of(array)).get("x")


@pytest.mark.parametrize("shape", [(7,), (64,), (1000,), (30, 70), (3, 5, 4, 2), ()])
def test_summary_equals_numpys(shape):
    values = np.random.default_rng(0).normal(3.0, 0.5, shape).astype(np.float32)
    (got,) = summary_of(values)
    expected = {
        "num": values.size, "min": values.min(), "max": values.max(), "sum": values.sum(),
        "sum_squares": (values**2).sum(), "mean": values.mean(), "std": values.std(),
    }  # fmt: skip
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4), name
    assert got["counts"].sum() == values.size
    if values.size > 1:
        counts, _ = np.histogram(values, BINS)
        # A value on the edge of a bin may be rounded into its neighbor.
        assert np.abs(np.cumsum(got["counts"]) - np.cumsum(counts)).max() <= 2


def test_arrays_of_different_sizes_and_dtypes_keep_their_order():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(i, 1, size).astype(np.float32) for i, size in enumerate((5, 3000, 5, 1, 70_000))]
    means = [summary["mean"] for summary in summary_of(*arrays, jnp.full(4, 1.5, jnp.bfloat16), np.array([True]))]
    np.testing.assert_allclose(means, [*(array.mean() for array in arrays), 1.5, 1], rtol=1e-4)


def test_values_that_are_not_finite_stay_out_of_the_bins_and_show_in_the_mean():
    (got,) = summary_of(np.array([1.0, np.nan, 3.0, np.inf], np.float32))
    assert (got["num"], got["min"], got["max"], got["sum"], got["counts"].sum()) == (2, 1, 3, 4, 2)
    assert np.isnan(got["mean"]) and np.isnan(got["std"])
    assert histogram_of(np.array([np.nan, np.inf], np.float32)) is None
    assert np.isnan(scale_of(rows_of(np.array([1.0, np.nan], np.float32), np.ones(3, np.float32))))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e30, -1e-30, 3.0e38])
def test_constant_array_is_one_bar_around_its_value(value):
    counts, edges, moments = histogram_of(np.full(5, value, np.float32))
    (place,) = np.flatnonzero(counts)
    assert counts[place] == moments["num"] == 5
    assert (np.diff(edges) > 0).all()
    assert edges[place] <= np.float32(value) <= edges[place + 1]


def test_range_of_all_floats_is_no_error():
    counts, edges, moments = histogram_of(np.array([-3e38, 0, 3e38], np.float32))
    assert counts.sum() == moments["num"] == 3
    assert np.isfinite(edges).all()


def test_drift_is_the_distance_between_batch_and_running_statistic():
    rng = np.random.default_rng(0)
    batches, before = rng.normal(2, 1, (2, 9)), rng.normal(1, 1, (2, 9))
    decays = np.array([0.99, 0.5])[:, None]
    after = decays * before + (1 - decays) * batches
    rows = rows_of(
        np.ones(4), *after.astype(np.float32), previous={1: before[0], 2: before[1]}, decays=((1, 0.99), (2, 0.5))
    )
    norm = np.linalg.norm
    expected = [norm(b - r) / max(norm(b), norm(r)) for b, r in zip(batches, before, strict=True)]
    np.testing.assert_allclose(rows[:, DRIFT], [UNKNOWN, *expected], rtol=1e-3)


def test_drift_is_one_from_zero_and_unknown_where_nothing_moved():
    start, after = np.zeros(3, np.float32), np.full(3, 0.02, np.float32)
    assert rows_of(after, previous={0: start}, decays=((0, 0.99),))[0, DRIFT] == pytest.approx(1)
    assert rows_of(after, previous={0: after}, decays=((0, 0.99),))[0, DRIFT] == UNKNOWN
    assert np.isnan(rows_of(np.array([np.nan]), previous={0: np.zeros(1)}, decays=((0, 0.99),))[0, DRIFT])


def test_updates_follow_the_arrays_in_the_order_asked_for():
    rng = np.random.default_rng(0)
    old = [rng.normal(size=size).astype(np.float32) for size in (5, 300, 5)]
    new = [array + rng.normal(0, 0.1, array.shape).astype(np.float32) for array in old]
    rows = rows_of(*new, previous={0: old[0], 1: old[1]}, updates=(0, 1))
    assert rows.shape == (5, ROW)
    np.testing.assert_allclose(rows[:3, MEAN], [array.mean() for array in new], rtol=1e-4)
    np.testing.assert_allclose(rows[3:, STD], [(new[i] - old[i]).std() for i in (0, 1)], rtol=1e-3)
    assert scale_of(rows[3:]) == pytest.approx(np.linalg.norm(np.concatenate([new[i] - old[i] for i in (0, 1)])), 1e-4)
