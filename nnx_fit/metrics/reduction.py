"""Reducing an epoch's metrics on the device: accumulators of shape `(6, capacity)` that a program carries along.

Rows are total, its rounding error, weight, its rounding error, the latest value, and whether there is one. Sums are
compensated (Kahan, 1965), so that a float32 accumulator stays exact over millions of batches.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.metrics.capture import MetricSpec, MetricTable

# Rows of a step's packed metrics, and after them those that `with_latest` adds.
VALUE, WEIGHT, PRESENT, LATEST, KNOWN = range(5)


def empty(capacity: int) -> np.ndarray:
    """Accumulators that hold nothing yet."""
    return np.zeros((6, capacity), np.float32)


def accumulate(accumulators: jax.Array, packed: jax.Array, table: MetricTable) -> jax.Array:
    """Adds one step's metrics, packed as by `MetricTable.pack`."""
    value, _, present = packed
    here = present > 0
    *sums, latest, known = accumulators
    # Without a reduction over the epoch, which most training steps have none of, a step spares itself the arithmetic.
    if any(spec.on_epoch for spec in table.specs):
        sums = _summed(sums, packed, here, table)
    return jnp.stack([*sums, jnp.where(here, value, latest), jnp.maximum(known, present)])


def _summed(sums: list[jax.Array], packed: jax.Array, here: jax.Array, table: MetricTable) -> list[jax.Array]:
    total, total_error, weight, weight_error = sums
    value, step_weight, _ = packed
    term = jnp.where(table.reduction_is("mean"), value * step_weight, value)
    summed, summed_error = _kahan(total, total_error, jnp.where(here, term, 0))
    weight_sum, weight_sum_error = _kahan(weight, weight_error, jnp.where(here, step_weight, 0))
    extreme = jnp.where(table.reduction_is("min"), jnp.minimum(total, value), jnp.maximum(total, value))
    extreme = jnp.where(weight == 0, value, extreme)
    is_extreme = table.reduction_is("min", "max")
    new_total = jnp.where(is_extreme, jnp.where(here, extreme, total), summed)
    return [new_total, jnp.where(is_extreme, 0, summed_error), weight_sum, weight_sum_error]


def with_latest(packed: jax.Array, accumulators: jax.Array) -> jax.Array:
    """A step's packed metrics with the latest values of the epoch: a step need not log every name."""
    return jnp.concatenate([packed, accumulators[4:]])


def _kahan(total: jax.Array, error: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    corrected = term - error
    new = total + corrected
    # A total that is not finite has no rounding error to carry; inf - inf would turn it into NaN.
    return new, jnp.where(jnp.isfinite(new), (new - total) - corrected, 0)


def reduced(spec: MetricSpec, place: int, accumulators: np.ndarray) -> float | None:
    """The epoch's value of one metric, or `None` if it was never logged.

    Args:
        spec: The metric.
        place: Its place.
        accumulators: Host copy of the accumulators, shape `(6, capacity)`; a capacity from before the table grew
            will do.
    """
    if place >= accumulators.shape[1]:
        return None
    total, total_error, weight, weight_error = (float(row[place]) for row in accumulators[:4])
    if weight == 0 and total == 0:
        return None
    total -= total_error
    if spec.reduce == "mean":
        weight -= weight_error
        return total / weight if weight else math.nan
    return total


def step_values(table: MetricTable, packed: np.ndarray) -> dict[MetricSpec, float]:
    """The values that one step logged, from a host copy of its packed metrics."""
    return _values(table, packed[VALUE], packed[PRESENT])


def latest_values(table: MetricTable, packed: np.ndarray) -> dict[MetricSpec, float]:
    """The latest values of the epoch at one step, from a host copy of what `with_latest` gave."""
    return _values(table, packed[LATEST], packed[KNOWN])


def _values(table: MetricTable, values: np.ndarray, there: np.ndarray) -> dict[MetricSpec, float]:
    # The table may have grown since; what it got then was not in this step.
    return {spec: float(value) for spec, value, is_there in zip(table.specs, values, there, strict=False) if is_there}
