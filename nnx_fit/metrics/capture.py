"""What a step logs: `self.log` inside a trace records values here, and the program packs them into small vectors.

Capturing happens once per trace; running the compiled step costs nothing on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.objects import LoggedMetric, ObjectSpec, check_state, computed, is_metric, object_options, path_of
from nnx_fit.metrics.spec import MERGED, RUNNING, MetricSpec, make_spec, scalar, twice, weight_of
from nnx_fit.metrics.table import MetricTable, TooManyMetrics, other_object
from nnx_fit.state import graph
from nnx_fit.state.layout import raw_value

__all__ = ["Capture", "MetricSpec", "MetricTable", "TooManyMetrics", "make_spec", "scalar"]


@dataclasses.dataclass
class _Entry:
    spec: MetricSpec
    value: jax.Array
    weight: Any


class Capture:
    """Collects the metrics of one step while it is traced.

    Args:
        hook: Name of the step hook, for messages.
        defaults: The hook's default (`on_step`, `on_epoch`), or `None` where logging is not possible.
        batch_size: Gives the batch's size when a mean over the epoch needs it.
        inputs: Everything that the step is given, to tell its own values from those of a transform within it.
        module: The module that the step runs on, whose metric objects may be logged.

    Attributes:
        objects: The metric objects that were logged, by name.
    """

    def __init__(
        self,
        hook: str,
        defaults: tuple[bool, bool] | None,
        batch_size: Callable[[], Any],
        inputs: Any = None,
        module: Any = None,
    ):
        self._hook = hook
        self._module = module
        self._inputs = jax.tree.leaves(inputs)
        self._defaults = defaults
        self._batch_size = batch_size
        self._traces = None if inputs is None else {id(trace) for trace in _traces(inputs)}
        self.entries: dict[str, _Entry] = {}
        self.objects: dict[str, LoggedMetric] = {}

    def log(self, name: str, value: Any, *, batch_size: Any = None, **options: Any) -> None:
        """Records one value, or a metric object; several values of one name in one step are reduced with each other."""
        if self._defaults is None:
            raise ConfigurationError(
                f"self.log({name!r}, ...) was called in {self._hook}, which has no metrics. Fix: return the value."
            )
        if is_metric(value):
            spec = object_options(name, value, self._defaults, {**options, "batch_size": batch_size})
            self._log_object(spec, value)
            return
        spec = make_spec(name, self._defaults, **options)
        weight: Any = 1.0
        if spec.on_epoch and spec.reduce == "mean":
            weight = self._batch_size() if batch_size is None else batch_size
        entry = _Entry(spec, scalar(name, value), weight_of(name, weight))
        self._check_not_nested(name, entry.value, entry.weight)
        self._add(entry)

    def _log_object(self, spec: MetricSpec, metric: Any) -> None:
        path, state, structure = None, [], None
        if spec.reduce == RUNNING:
            own = [leaf for _, value in graph.flatten(metric)[1] for leaf in jax.tree.leaves(raw_value(value))]
            self._check_not_nested(spec.name, *own)
            path = path_of(spec.name, metric, self._module)
            self._check_updated(spec.name, metric, own)
            check_state(spec.name, metric)
        else:
            leaves, structure = jax.tree.flatten(metric)
            state = [jnp.asarray(leaf) for leaf in leaves]
        parts, values = computed(spec, metric, self._module)
        arrays = state if spec.reduce == MERGED else [values]
        self._check_not_nested(spec.name, values, *arrays)
        self._add_object(LoggedMetric(ObjectSpec(spec.name, path, parts, structure), arrays))
        if spec.on_step:
            for part, value in zip(parts, values, strict=True):
                self._add(_Entry(part.spec, value, jnp.float32(1)))

    def _add_object(self, new: LoggedMetric) -> None:
        name, old = new.spec.name, self.objects.get(new.spec.name)
        if old is not None and old.spec != new.spec:
            raise other_object(old.spec, new.spec)
        self.objects[name] = new if old is None or new.spec.path is not None else old.merged_with(new)

    def _check_updated(self, name: str, metric: nnx.Metric, state: list[Any]) -> None:
        given = {id(leaf) for leaf in self._inputs}
        if state and all(id(leaf) in given for leaf in state):
            raise ConfigurationError(
                f"self.log({name!r}, ...) got a {type(metric).__name__} that {self._hook} did not update before.\n"
                "Fix: call its `update(...)` with this batch first."
            )

    def _check_not_nested(self, name: str, *values: Any) -> None:
        if self._traces is not None and any(id(trace) not in self._traces for trace in _traces(values)):
            raise ConfigurationError(
                f"self.log({name!r}, ...) was called inside a transform within {self._hook} (a nested nnx.jit, scan, "
                "vmap, cond, remat or grad), and its value exists only there.\n"
                "Fix: return the value from the transformed function (with has_aux=True from a gradient), and log it "
                f"in {self._hook} itself."
            )

    def _add(self, new: _Entry) -> None:
        old = self.entries.get(new.spec.name)
        if old is None:
            self.entries[new.spec.name] = new
            return
        if old.spec != new.spec:
            raise twice(old.spec, new.spec)
        if new.spec.reduce == RUNNING:
            old.value = new.value
        elif new.spec.reduce in ("mean", MERGED):
            weight = old.weight + new.weight
            old.value = (old.value * old.weight + new.value * new.weight) / weight
            old.weight = weight
        else:
            combine = {"sum": jnp.add, "min": jnp.minimum, "max": jnp.maximum}[new.spec.reduce]
            old.value = combine(old.value, new.value)

    def within(self, inputs: Any = None) -> Capture:
        """Collects what a differentiated function of the step logs, whose values are those of another trace."""
        return Capture(self._hook, self._defaults, self._batch_size, inputs, self._module)

    def adopt(
        self,
        values: Mapping[str, tuple[Any, Any]],
        specs: Mapping[str, MetricSpec],
        objects: Mapping[str, LoggedMetric] | None = None,
    ) -> None:
        """Takes over what such a function logged, as it was there, once it is of this trace."""
        for name, (value, weight) in values.items():
            self._add(_Entry(specs[name], value, weight))
        for logged in (objects or {}).values():
            self._add_object(logged)

    def values(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The (value, weight) of each name: what leaves the differentiated function."""
        return {name: (entry.value, entry.weight) for name, entry in self.entries.items()}

    def specs(self) -> dict[str, MetricSpec]:
        """How each name is treated."""
        return {name: entry.spec for name, entry in self.entries.items()}


def _traces(values: Any) -> Iterator[Any]:
    """The traces that some values belong to, and those around them."""
    for value in jax.tree.leaves(values):
        trace = value._trace if isinstance(value, jax.core.Tracer) else None
        while trace is not None:
            yield trace
            trace = getattr(trace, "parent_trace", None)
