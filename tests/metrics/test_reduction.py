"""Accumulators against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.metrics.capture import MetricTable, make_spec
from nnx_fit.metrics.reduction import Accumulators, accumulate, empty, on_device, reduced, step_values

REDUCTIONS = ("mean", "sum", "min", "max")


def table_of(*reductions, capacity=32):
    table = MetricTable(capacity)
    for index, reduce in enumerate(reductions):
        table.place(make_spec(f"{reduce}{index}", (False, True), reduce=reduce))
    return table


def pack(table, values, weights, present=None):
    """One step's packed metrics; every name in it gets the same value and weight."""
    packed = np.zeros((3, table.capacity), np.float32)
    count = len(table.specs)
    packed[0, :count], packed[1, :count] = values, weights
    packed[2, :count] = 1 if present is None else present
    return jnp.asarray(packed)


def over(table, steps):
    accumulators = on_device(empty(table))
    step = jax.jit(lambda accumulators, packed: accumulate(accumulators, packed, table))
    for packed in steps:
        accumulators = step(accumulators, packed)
    return np.asarray(accumulators.sums)


def read(table, accumulators):
    return {spec.reduce: reduced(spec, place, accumulators) for place, spec in enumerate(table.specs)}


@pytest.mark.parametrize("seed", range(3))
def test_every_reduction_equals_numpy(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=50).astype(np.float32) * 10, rng.integers(1, 9, 50)
    table = table_of(*REDUCTIONS)
    got = read(table, over(table, [pack(table, v, w) for v, w in zip(values, weights, strict=True)]))
    exact = values.astype(np.float64)
    assert got["mean"] == pytest.approx(np.average(exact, weights=weights), rel=1e-6)
    assert got["sum"] == pytest.approx(exact.sum(), rel=1e-6)
    assert (got["min"], got["max"]) == (exact.min(), exact.max())


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_the_extreme_of_one_value_is_that_value(value):
    table = table_of("min", "max")
    assert read(table, over(table, [pack(table, value, 1)])) == {"min": value, "max": value}


def test_a_name_that_is_absent_from_a_step_is_left_alone():
    table = table_of(*REDUCTIONS)
    steps = [pack(table, 2, 3), pack(table, 100, 100, present=0), pack(table, 4, 1), pack(table, -100, 1, present=0)]
    assert read(table, over(table, steps)) == {"mean": 2.5, "sum": 6, "min": 2, "max": 4}


def test_a_name_that_was_never_logged_has_no_value():
    table = table_of(*REDUCTIONS)
    assert set(read(table, over(table, [pack(table, 1, 1, present=0)])).values()) == {None}
    assert set(read(table, empty(table).sums).values()) == {None}


def test_a_sum_of_nothing_but_zeros_is_zero():
    table = table_of(*REDUCTIONS)
    assert set(read(table, over(table, [pack(table, 0, 1)])).values()) == {0}


def test_a_million_small_additions_to_a_large_total_are_exact():
    """Plain float32 summation stands still at 2**24: it would give 16,777,216 and a mean 6% too small."""
    table = table_of("sum", "mean", capacity=2)
    start, count = 2.0**24, 1_000_000

    @jax.jit
    def run(accumulators):
        one = pack(table, 1, 1)
        return jax.lax.fori_loop(0, count, lambda _, a: accumulate(a, one, table), accumulators)

    got = read(table, np.asarray(run(Accumulators(jnp.asarray(over(table, [pack(table, start, 1)])), {})).sums))
    assert got["sum"] == start + count
    assert got["mean"] == (start + count) / (count + 1)


def test_a_million_weighted_fractions_average_to_double_precision():
    table = table_of("mean", capacity=1)
    count, value, weight = 1_000_000, np.float32(0.1), 32

    @jax.jit
    def run(accumulators):
        step = pack(table, value, weight)
        return jax.lax.fori_loop(0, count, lambda _, a: accumulate(a, step, table), accumulators)

    got = read(table, np.asarray(run(on_device(empty(table))).sums))
    assert got["mean"] == pytest.approx(float(value), rel=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_value_that_is_not_finite_shows_in_the_result_and_stays(bad, position):
    values = [1.0, 2.0, 3.0]
    values[position] = bad
    table = table_of(*REDUCTIONS)
    got = read(table, over(table, [pack(table, v, 2) for v in values]))
    with np.errstate(invalid="ignore"):
        expected = {
            "mean": np.mean(values),
            "sum": np.sum(values),
            "min": np.minimum.reduce(values),
            "max": np.maximum.reduce(values),
        }
    assert {name: repr(value) for name, value in got.items()} == {n: repr(float(v)) for n, v in expected.items()}


def test_both_infinities_give_nan_and_not_an_extreme():
    table = table_of(*REDUCTIONS)
    got = read(table, over(table, [pack(table, v, 1) for v in (math.inf, -math.inf, 1.0)]))
    assert math.isnan(got["mean"]) and math.isnan(got["sum"])
    assert (got["min"], got["max"]) == (-math.inf, math.inf)


def test_a_mean_whose_weights_are_all_zero_is_nan_and_not_an_error():
    table = table_of("mean")
    accumulators = over(table, [pack(table, math.nan, 0)])
    assert math.isnan(read(table, accumulators)["mean"])


def test_vectors_from_before_the_table_grew_are_still_read():
    table = table_of("mean", "sum", capacity=2)
    old_step = np.asarray(pack(table, 5, 2))
    old_epoch = over(table, [jnp.asarray(old_step)])
    table.grow()
    late = make_spec("late", (False, True))
    table.place(late)
    assert {spec.reduce: value for spec, value in step_values(table, old_step).items()} == {"mean": 5, "sum": 5}
    assert reduced(late, 2, old_epoch) is None
    assert reduced(table.specs[0], 0, old_epoch) == 5
