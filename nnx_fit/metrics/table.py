"""`MetricTable`: a fixed place for every name that a stage's steps log.

It is shared by all programs of the stage, so that a ragged last batch or a branch taken later lands in the same
accumulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.objects import LoggedMetric, ObjectSpec
from nnx_fit.metrics.spec import OF_OBJECTS, RUNNING, MetricSpec, twice
from nnx_fit.state import graph


def other_object(old: ObjectSpec, new: ObjectSpec) -> ConfigurationError:
    """The error for one name logged with two metric objects."""
    for mine, other in zip(old.parts, new.parts, strict=False):
        if mine.spec != other.spec and mine.spec.name == other.spec.name:
            return twice(mine.spec, other.spec)
    return ConfigurationError(
        f"self.log({new.name!r}, ...) was called with two metrics, or with one that computes something else each time: "
        f"{_sketch(old)} and {_sketch(new)}.\nFix: give one of them another name."
    )


def _sketch(spec: ObjectSpec) -> str:
    where = "a merged metric" if spec.path is None else f"`{graph.path_name(spec.path)}`"
    return f"{where} of {', '.join(f'{part.spec.name} {part.shape}' for part in spec.parts)}"


class TooManyMetrics(Exception):  # noqa: N818 - control flow of a trace, never seen by a user
    """More was logged than the accumulators have places for: grow them and trace again."""


class MetricTable:
    """The place of every metric name in a stage's vectors; names are only ever added.

    Attributes:
        capacity: Number of places in the vectors.
        specs: The metrics in order of their places.
        objects: The metric objects by name.
        starts: Their accumulators at the start of an epoch, where a trace has seen them.
    """

    def __init__(self, capacity: int = 32):
        self.capacity = capacity
        self.specs: list[MetricSpec] = []
        self.objects: dict[str, ObjectSpec] = {}
        self.starts: dict[str, list[Any]] = {}
        self._names: dict[str, MetricSpec] = {}
        self._records: dict[str, str] = {}
        self._places: dict[str, int] = {}

    def place(self, spec: MetricSpec) -> int:
        """Where a metric goes, giving it the next place when it is new."""
        index = self._places.get(spec.name)
        self._check_name(spec)
        if index is None:
            if len(self.specs) == self.capacity:
                raise TooManyMetrics
            index = self._places[spec.name] = len(self.specs)
            self.specs.append(spec)
        return index

    def place_object(self, spec: ObjectSpec) -> None:
        """Takes a metric object in, or the same one again."""
        old = self.objects.get(spec.name)
        if old is not None and old != spec and not (old.structure is None and spec.path is None):
            raise other_object(old, spec)
        for each in spec.recorded():
            self._check_name(each)
        self.objects[spec.name] = spec

    def place_logged(self, logged: LoggedMetric) -> None:
        """Takes in a metric object that a step logged."""
        self.place_object(logged.spec)
        if logged.spec.name not in self.starts:
            self.starts[logged.spec.name] = logged.start()

    def _check_name(self, spec: MetricSpec) -> None:
        old = self._names.setdefault(spec.name, spec)
        if old != spec:
            raise twice(old, spec)
        for record in spec.records:
            if (owner := self._records.setdefault(record, spec.name)) != spec.name:
                raise ConfigurationError(
                    f"self.log({spec.name!r}, ...) and self.log({owner!r}, ...) would both be recorded as {record!r}.\n"
                    "Fix: give one of them another name."
                )

    @property
    def recorded(self) -> list[MetricSpec]:
        """Every name that has records: those of values, and those of metric objects."""
        of_objects = [spec for each in self.objects.values() for spec in each.recorded()]
        return [*(spec for spec in self.specs if spec.reduce not in OF_OBJECTS), *of_objects]

    @property
    def has_epoch(self) -> bool:
        """Whether anything is to be recorded at the end of an epoch."""
        parts = [part.spec for each in self.objects.values() for part in each.parts]
        return any(spec.on_epoch for spec in (*self.specs, *parts))

    @property
    def paths(self) -> list[graph.Path]:
        """Where the `nnx.Metric`s are in the module."""
        return [spec.path for spec in self.objects.values() if spec.path is not None]

    def grow(self) -> None:
        """Doubles the capacity if it is used up."""
        if len(self.specs) == self.capacity:
            self.capacity *= 2

    def state_dict(self) -> dict[str, Any]:
        """Which metrics there are, as plain values."""
        return {
            "values": [dataclasses.asdict(spec) for spec in self.specs],
            "objects": [spec.state_dict() for spec in self.objects.values()],
        }

    def load_state_dict(self, state: Any) -> None:
        """Takes back what `state_dict` gave."""
        for plain in state["values"]:
            if len(self.specs) == self.capacity:
                self.grow()
            self.place(MetricSpec(**plain))
        for plain in state["objects"]:
            self.place_object(ObjectSpec.from_state_dict(plain))

    def pack(self, values: Mapping[str, tuple[Any, Any]], specs: Mapping[str, MetricSpec]) -> jax.Array:
        """The metrics of one step as one float32 array of shape `(3, capacity)`: values, weights, presence."""
        places = {name: self.place(spec) for name, spec in specs.items()}
        named = {place: name for name, place in places.items()}
        absent = np.float32(0)
        rows = [[values[named[i]][part] if i in named else absent for i in range(len(self.specs))] for part in range(2)]
        present = [np.float32(i in named) for i in range(len(self.specs))]
        rest = np.zeros(self.capacity - len(self.specs), np.float32)
        # One concatenation: a scatter for each row costs a small step more than the rest of its metrics.
        parts = [part for row in (*rows, present) for part in (*(jnp.reshape(x, 1) for x in row), rest)]
        return jnp.concatenate(parts).reshape(3, self.capacity)

    def are(self, names: Iterable[str]) -> np.ndarray:
        """Which places belong to these names and are means of batches, boolean, shape `(capacity,)`.

        What an `nnx.Metric` gives is not: it is of all batches so far.
        """
        places = np.zeros(self.capacity, bool)
        places[[self._places[name] for name in names]] = True
        return places & ~self.reduction_is(RUNNING)

    def reduction_is(self, *reductions: str) -> np.ndarray:
        """Which places have one of these reductions, boolean, shape `(capacity,)`."""
        flags = [spec.reduce in reductions for spec in self.specs]
        return np.array(flags + [False] * (self.capacity - len(flags)))
