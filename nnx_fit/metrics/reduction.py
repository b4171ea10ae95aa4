"""Reducing an epoch's metrics on the device: `Accumulators` that a program carries along.

Sums have the shape `(6, capacity)`. Rows are total, its rounding error, weight, its rounding error, the latest value,
and whether there is one. Sums are compensated (Kahan, 1965), so that a float32 accumulator stays exact over millions of
batches. What metric objects need is in arrays of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import CheckpointError
from nnx_fit.metrics.capture import MetricSpec, MetricTable, TooManyMetrics
from nnx_fit.metrics.objects import LoggedMetric

# Rows of a step's packed metrics, and after them those that `with_latest` adds.
VALUE, WEIGHT, PRESENT, LATEST, KNOWN = range(5)


_OBJECT = "object "


class Accumulators(NamedTuple):
    """What an epoch's metrics came to so far.

    Attributes:
        sums: Of values, float32 of shape `(6, capacity)`.
        objects: Of each metric object whether there is a value and its numbers, a vector; then the arrays of its state.
    """

    sums: Any
    objects: dict[str, list[Any]]

    def copy_to_host_async(self) -> None:
        """Starts the copy of what is read at the end of an epoch."""
        for array in self.results:
            array.copy_to_host_async()

    @property
    def results(self) -> list[Any]:
        """What is read at the end of an epoch."""
        return [self.sums, *(arrays[0] for arrays in self.objects.values())]

    def named(self) -> dict[str, Any]:
        """Its arrays by name."""
        named = {f"{_OBJECT}{i} {name}": a for name, arrays in self.objects.items() for i, a in enumerate(arrays)}
        return {"epoch": self.sums, **named}

    @classmethod
    def from_named(cls, arrays: Mapping[str, Any]) -> Accumulators:
        """What `named` was made of."""
        objects: dict[str, dict[int, Any]] = {}
        for key, array in arrays.items():
            if key.startswith(_OBJECT):
                index, name = key.removeprefix(_OBJECT).split(" ", 1)
                objects.setdefault(name, {})[int(index)] = np.asarray(array)
        ordered = {name: [each[i] for i in sorted(each)] for name, each in objects.items()}
        return cls(np.asarray(arrays["epoch"]), ordered)


def empty(table: MetricTable) -> Accumulators:
    """Accumulators that hold nothing yet."""
    return grown(Accumulators(np.zeros((6, 0), np.float32), {}), table)


def grown(accumulators: Accumulators, table: MetricTable) -> Accumulators:
    """Host copies of the accumulators, with room for all that is in the table."""
    sums = np.asarray(accumulators.sums)
    sums = np.pad(sums, ((0, 0), (0, table.capacity - sums.shape[1])))
    held = {name: [np.asarray(array) for array in arrays] for name, arrays in accumulators.objects.items()}
    return Accumulators(sums, dict(table.starts) | held)


def on_device(accumulators: Accumulators) -> Accumulators:
    """The same in buffers of their own, to be donated."""
    return jax.tree.map(lambda array: jnp.asarray(array).copy(), accumulators)


def accumulate(
    accumulators: Accumulators, packed: jax.Array, table: MetricTable, objects: Mapping[str, LoggedMetric] | None = None
) -> Accumulators:
    """Adds one step's metrics.

    Args:
        accumulators: Those before the step.
        packed: The step's values, packed as by `MetricTable.pack`.
        table: Places of the metrics.
        objects: The metric objects that the step logged.

    Raises:
        TooManyMetrics: An object is new.
    """
    value, _, present = packed
    here = present > 0
    *sums, latest, known = accumulators.sums
    # Without a reduction over the epoch, which most training steps have none of, a step spares itself the arithmetic.
    if any(spec.on_epoch for spec in table.specs):
        sums = _summed(sums, packed, here, table)
    sums = jnp.stack([*sums, jnp.where(here, value, latest), jnp.maximum(known, present)])
    return Accumulators(sums, _with_objects(accumulators.objects, table, objects or {}))


def _with_objects(
    old: dict[str, list[Any]], table: MetricTable, objects: Mapping[str, LoggedMetric]
) -> dict[str, list[Any]]:
    for logged in objects.values():
        table.place_logged(logged)
    if any(name not in old for name in objects):
        raise TooManyMetrics
    for name in objects:
        if [array.shape for array in old[name]] != [array.shape for array in table.starts[name]]:
            raise CheckpointError(
                f"self.log({name!r}, ...): the checkpoint holds another metric of that name.\n"
                "Fix: log the one that the run was saved with, or give this one another name."
            )
    return old | {name: logged.added_to(old[name]) for name, logged in objects.items()}


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


def with_latest(packed: jax.Array, accumulators: Accumulators) -> jax.Array:
    """A step's packed metrics with the latest values of the epoch: a step need not log every name."""
    return jnp.concatenate([packed, accumulators.sums[4:]])


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
        accumulators: Host copy of the sums, shape `(6, capacity)`; a capacity from before the table grew will do.
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
