"""What has arrived on the host: values with the names of their records, and pictures of class-wise metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from nnx_fit.metrics.capture import MetricSpec, MetricTable
from nnx_fit.metrics.figures import draw
from nnx_fit.metrics.objects import ObjectSpec
from nnx_fit.metrics.reduction import Accumulators, reduced
from nnx_fit.metrics.spec import OF_OBJECTS

Rename = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Value:
    """One value on the host, and how it is treated.

    Attributes:
        record: Name of its record, which differs from its own when step and epoch are both recorded.
        own: The metric's own name.
        value: The value.
        spec: How it is treated.
        detail: Whether it is for `History` only: one of the many numbers of a matrix.
    """

    record: str
    own: str
    value: float
    spec: MetricSpec
    detail: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A class-wise metric to be drawn.

    Attributes:
        tag: Its name.
        values: A vector or a matrix.
        labels: What stands at each place along each axis.
        axes: What each axis is, if that is known.
    """

    tag: str
    values: np.ndarray
    labels: Sequence[Sequence[str]]
    axes: Sequence[str] = ()

    def draw(self) -> np.ndarray | None:
        """The image; see `figures.draw`."""
        return draw(self.tag, self.values, self.labels, self.axes)


def read_epoch(table: MetricTable, accumulators: Accumulators, rename: Rename) -> list[Value | Picture]:
    """An epoch's metrics; waits for those that have not arrived.

    Args:
        table: Places of the metrics.
        accumulators: What they came to.
        rename: Gives a metric the name under which it is recorded.
    """
    sums = np.asarray(accumulators.sums)
    read: list[Value | Picture] = []
    for place, spec in enumerate(table.specs):
        if spec.on_epoch and spec.reduce not in OF_OBJECTS and (value := reduced(spec, place, sums)) is not None:
            read.append(Value(rename(spec.epoch_name), rename(spec.name), value, spec))
    for name, arrays in accumulators.objects.items():
        numbers = np.asarray(arrays[0])
        if numbers[0]:
            read += object_values(table.objects[name], numbers[1:], rename)
    return read


def object_values(spec: ObjectSpec, numbers: np.ndarray, rename: Rename) -> list[Value | Picture]:
    """What a metric object computed for an epoch.

    Args:
        spec: How it is treated.
        numbers: All its numbers, a vector.
        rename: Gives a metric the name under which it is recorded.
    """
    read: list[Value | Picture] = []
    for part, values in spec.split(numbers):
        if not part.spec.on_epoch:
            continue
        for each, value in zip(part.numbers(), values.reshape(-1), strict=False):
            read.append(Value(rename(each.epoch_name), rename(each.name), float(value), each, len(part.shape) == 2))
        if part.shape and part.spec.logger:
            read.append(Picture(rename(part.spec.name), values, part.labels, part.axes))
    return read
