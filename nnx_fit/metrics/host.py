"""What host hooks log: the same rules as in a program, reduced in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.objects import ObjectSpec, computed, is_merged, is_metric, object_options
from nnx_fit.metrics.spec import MetricSpec, make_spec, scalar, twice, weight_of
from nnx_fit.metrics.values import Picture, Value, object_values


class HostMetrics:
    """What host hooks log: the same rules as in a program, reduced in float64."""

    def __init__(self) -> None:
        self._specs: dict[str, MetricSpec] = {}
        self._epoch: dict[str, list[tuple[Any, float]]] = {}
        self._step: dict[str, Any] = {}
        self._objects: dict[str, tuple[ObjectSpec, Any]] = {}

    def log(
        self,
        name: str,
        value: Any,
        defaults: tuple[bool, bool],
        *,
        batch_size: Any = None,
        module: Any = None,
        **options: Any,
    ) -> None:
        """Records one value, which may still be on the device, or what a metric object computes now.

        Args:
            name: Name of the metric.
            value: The value or metric object.
            defaults: The hook's own (`on_step`, `on_epoch`).
            batch_size: The value's weight in the epoch's mean, 1 by default.
            module: The module that logs it.
            **options: Those of `make_spec`.

        Raises:
            ConfigurationError: The value, or an option, is none that can be recorded.
        """
        if is_metric(value):
            spec = object_options(name, value, defaults, {**options, "batch_size": batch_size})
            self._log_object(spec, value, module)
            return
        spec = make_spec(name, defaults, **options)
        weight = 1.0 if batch_size is None else float(weight_of(name, batch_size))
        self._check(spec)
        # What is on the host already stays as exact as it is.
        plain = value.item() if isinstance(value, np.generic) else value
        checked = plain if isinstance(plain, int | float) else scalar(name, value)
        if spec.on_step:
            self._step[name] = checked
        if spec.on_epoch:
            self._epoch.setdefault(name, []).append((checked, weight))

    def _log_object(self, spec: MetricSpec, metric: Any, module: Any) -> None:
        if spec.on_epoch and is_merged(metric) and spec.name in self._objects:
            raise ConfigurationError(
                f"self.log({spec.name!r}, ...) was called with a {type(metric).__name__} for the second time in this "
                "epoch, and in a host hook nothing merges them.\n"
                "Fix: log it in the step, where it is merged over the loop; or merge them yourself and log that once."
            )
        parts, values = computed(spec, metric, module)
        described = ObjectSpec(spec.name, None, parts)
        for each in described.recorded():
            self._check(each)
        if spec.on_step:
            self._step |= {part.spec.name: value for part, value in zip(parts, values, strict=True)}
        if spec.on_epoch:
            self._objects[spec.name] = described, values

    def _check(self, spec: MetricSpec) -> None:
        old = self._specs.setdefault(spec.name, spec)
        if old != spec:
            raise twice(old, spec)

    def steps(self) -> list[tuple[MetricSpec, Any]]:
        """The values logged since the last `take_step`, which may still be on the device."""
        return [(self._specs[name], value) for name, value in self._step.items()]

    def take_step(self) -> list[tuple[MetricSpec, Any]]:
        """The values of `steps`, which are taken for a step's record."""
        taken = self.steps()
        self._step = {}
        return taken

    def take_epoch(self) -> list[Value | Picture]:
        """The reduced values of the epoch, which then starts over."""
        taken: list[Value | Picture] = []
        for name, items in self._epoch.items():
            spec = self._specs[name]
            values = np.array([float(value) for value, _ in items])
            weights = np.array([weight for _, weight in items])
            # Metrics that are not finite are for the user to see, not for NumPy to warn about.
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                reduce = {"sum": np.sum, "min": np.min, "max": np.max}.get(spec.reduce)
                result = reduce(values) if reduce else np.sum(values * weights) / np.sum(weights)
            taken.append(Value(spec.epoch_name, spec.name, float(result), spec))
        for described, numbers in self._objects.values():
            taken += object_values(described, np.asarray(numbers), str)
        self._epoch, self._objects = {}, {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What was logged and not yet recorded, as plain values."""
        return {
            "specs": [dataclasses.asdict(spec) for spec in self._specs.values()],
            "step": {name: float(value) for name, value in self._step.items()},
            "epoch": {name: [[float(value), weight] for value, weight in items] for name, items in self._epoch.items()},
            "objects": [
                [described.state_dict(), np.asarray(values).tolist()] for described, values in self._objects.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._specs = {spec["name"]: MetricSpec(**spec) for spec in state["specs"]}
        self._step = dict(state["step"])
        self._epoch = {name: [(value, weight) for value, weight in items] for name, items in state["epoch"].items()}
        restored = [(ObjectSpec.from_state_dict(plain), np.array(values)) for plain, values in state.get("objects", ())]
        self._objects = {described.name: (described, values) for described, values in restored}
