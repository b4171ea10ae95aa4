"""The metric ledger: device vectors in, host values out, late and in order.

Programs hand in the packed metrics of steps and the accumulators of epochs without waiting. The ledger starts their
copy to the host where a record is due, and publishes each record (to History, loggers, and the `*_metrics` views)
once it has arrived. Only somebody who asks for a value waits for it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnx_fit.metrics.capture import MetricSpec, MetricTable, make_spec, scalar, twice
from nnx_fit.metrics.history import History
from nnx_fit.metrics.reduction import latest_values, reduced, step_values

Publish = Callable[[dict[str, float], int], None]


@dataclasses.dataclass(frozen=True)
class _Value:
    """One value on the host, and how it is treated.

    `record` is the name of its record; it differs from the metric's `own` name when step and epoch are both recorded.
    """

    record: str
    own: str
    value: float
    spec: MetricSpec


@dataclasses.dataclass
class _Record:
    """Values on their way to the host, and how to read them once they are there; a quiet one is not recorded."""

    step: int
    arrays: Sequence[Any]
    read: Callable[[], list[_Value]]
    quiet: bool = False


@dataclasses.dataclass
class _Deferred:
    """Something else that waits for the device."""

    arrays: Sequence[Any]
    call: Callable[[], None]


class HostMetrics:
    """What host hooks log: the same rules as in a program, reduced in float64."""

    def __init__(self) -> None:
        self._specs: dict[str, MetricSpec] = {}
        self._epoch: dict[str, list[tuple[Any, float]]] = {}
        self._step: dict[str, Any] = {}

    def log(
        self, name: str, value: Any, defaults: tuple[bool, bool], *, batch_size: Any = None, **options: Any
    ) -> None:
        """Records one value; it may still be on the device."""
        spec = make_spec(name, defaults, **options)
        checked = value if isinstance(value, int | float) else scalar(name, value)
        old = self._specs.setdefault(name, spec)
        if old != spec:
            raise twice(old, spec)
        if spec.on_step:
            self._step[name] = checked
        if spec.on_epoch:
            self._epoch.setdefault(name, []).append((checked, 1.0 if batch_size is None else float(batch_size)))

    def steps(self) -> list[tuple[MetricSpec, Any]]:
        """The values logged since the last `take_step`, which may still be on the device."""
        return [(self._specs[name], value) for name, value in self._step.items()]

    def take_step(self) -> list[tuple[MetricSpec, Any]]:
        """The values of `steps`, which are taken for a step's record."""
        taken = self.steps()
        self._step = {}
        return taken

    def take_epoch(self) -> list[_Value]:
        """The reduced values of the epoch, which then starts over."""
        taken = []
        for name, items in self._epoch.items():
            spec = self._specs[name]
            values = np.array([float(value) for value, _ in items])
            weights = np.array([weight for _, weight in items])
            # Metrics that are not finite are for the user to see, not for NumPy to warn about.
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                reduce = {"sum": np.sum, "min": np.min, "max": np.max}.get(spec.reduce)
                result = reduce(values) if reduce else np.sum(values * weights) / np.sum(weights)
            taken.append(_Value(spec.epoch_name, spec.name, float(result), spec))
        self._epoch = {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What was logged and not yet recorded, as plain values."""
        return {
            "specs": [dataclasses.asdict(spec) for spec in self._specs.values()],
            "step": {name: float(value) for name, value in self._step.items()},
            "epoch": {name: [[float(value), weight] for value, weight in items] for name, items in self._epoch.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._specs = {spec["name"]: MetricSpec(**spec) for spec in state["specs"]}
        self._step = dict(state["step"])
        self._epoch = {name: [(value, weight) for value, weight in items] for name, items in state["epoch"].items()}


class Ledger:
    """Everything that is logged in a run.

    Args:
        history: Where every record is kept.
        publish: Hands a record's loggable values and its step to the loggers.

    Attributes:
        host: What host hooks log, by the kind of loop they belong to: `"train"` or `"eval"`.
    """

    def __init__(self, history: History, publish: Publish):
        self.history = history
        self.host = {"train": HostMetrics(), "eval": HostMetrics()}
        self._publish = publish
        self._pending: collections.deque[_Record | _Deferred] = collections.deque()
        self._callback: dict[str, float] = {}
        self._progress: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._latest: tuple[MetricTable, Any] | None = None
        self._recent: collections.deque[tuple[MetricTable, Any]] = collections.deque(maxlen=4)

    def step(self, table: MetricTable, packed: Any) -> None:
        """Notes the metrics of the step that was just dispatched."""
        self._latest = (table, packed)
        self._recent.append(self._latest)

    def log_step(self, step: int) -> None:
        """Makes a record of the last step's metrics."""
        if self._latest is not None:
            table, packed = self._latest
            if any(spec.on_step for spec in table.specs):
                packed.copy_to_host_async()
                self._pending.append(_Record(step, [packed], lambda: _read_step(table, packed)))

    def log_host_step(self, step: int) -> None:
        """Makes a record of what batch hooks logged since the last one."""
        logged = self.host["train"].take_step()
        if logged:
            self._pending.append(_Record(step, [value for _, value in logged], lambda: _on_host(logged)))

    def log_epoch(self, step: int, table: MetricTable, accumulators: Any, rename: Callable[[str], str]) -> None:
        """Makes a record of an epoch's reduced metrics."""
        if self._latest is not None and self._latest[0] is table:
            # From now on the epoch's values are the latest ones of metrics that have both.
            last, self._latest = self._latest[1], None
            self._recent.clear()
            self._pending.append(_Record(step, [last], lambda: _read_latest(table, last), quiet=True))
        if not any(spec.on_epoch for spec in table.specs):
            return
        accumulators.copy_to_host_async()
        self._pending.append(_Record(step, [accumulators], lambda: _read_epoch(table, accumulators, rename)))

    def log_host_epoch(self, stage: str, step: int) -> dict[str, float]:
        """Makes a record of what the hooks of an epoch logged, and returns it; `stage` is `"train"` or `"eval"`."""
        host = self.host[stage]
        values = [*(_on_host(host.take_step()) if stage == "eval" else []), *host.take_epoch()]
        if values:
            self._pending.append(_Record(step, [], lambda: values))
        return {value.record: value.value for value in values}

    def defer(self, arrays: Sequence[Any], call: Callable[[], None]) -> None:
        """Has something called, in turn, once arrays have arrived on the host; their copy is started here."""
        for array in arrays:
            array.copy_to_host_async()
        self._pending.append(_Deferred(arrays, call))

    def forget_host(self, stage: str) -> None:
        """Drops what the hooks of an epoch logged."""
        self.host[stage] = HostMetrics()

    def read_epoch(self, table: MetricTable, accumulators: Any, rename: Callable[[str], str]) -> dict[str, float]:
        """An epoch's reduced metrics as values, without recording them. Waits for the device."""
        return {value.own: value.value for value in _read_epoch(table, accumulators, rename)}

    def poll(self) -> None:
        """Publishes what has arrived."""
        while self._pending and _ready(self._pending[0].arrays):
            self._release(self._pending.popleft())

    def drain(self) -> None:
        """Waits for everything that was logged and publishes it."""
        while self._pending:
            self._release(self._pending.popleft())

    @property
    def pending(self) -> bool:
        """Whether records wait for the device."""
        return bool(self._pending)

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The latest value of everything logged, also between log points. Waits for the device."""
        self.drain()
        metrics = dict(self._callback)
        latest = _on_host(self.host["train"].steps())
        if self._latest is not None:
            latest = [*_read_latest(*self._latest), *latest]
        for value in latest:
            metrics[value.record] = metrics[value.own] = value.value
        return metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest values with `prog_bar=True` that have arrived. Never waits."""
        for table, packed in reversed(self._recent):
            if packed.is_ready():
                self._progress |= {v.own: v.value for v in _read_latest(table, packed) if v.spec.prog_bar}
                break
        return dict(self._progress)

    @property
    def logged_metrics(self) -> dict[str, float]:
        """What loggers were given last, by name."""
        return dict(self._logged)

    def state_dict(self) -> dict[str, Any]:
        """What a run that continues needs besides history: values not yet recorded, and the latest of all others."""
        return {
            "host": self.host["train"].state_dict(),
            "callback": self.callback_metrics,
            "progress": self.progress_bar_metrics,
            "logged": self.logged_metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.host["train"].load_state_dict(state["host"])
        self._callback = dict(state["callback"])
        self._progress = dict(state["progress"])
        self._logged = dict(state["logged"])

    def _release(self, record: _Record | _Deferred) -> None:
        if isinstance(record, _Deferred):
            record.call()
            return
        values = record.read()
        for value in values:
            self._callback[value.record] = self._callback[value.own] = value.value
            if value.spec.prog_bar:
                self._progress[value.own] = value.value
        if record.quiet:
            return
        self.history.append(record.step, {value.record: value.value for value in values})
        loggable = {value.record: value.value for value in values if value.spec.logger}
        if loggable:
            self._logged |= loggable
            self._publish(loggable, record.step)


def _ready(arrays: Sequence[Any]) -> bool:
    return all(array.is_ready() for array in arrays if hasattr(array, "is_ready"))


def _on_host(logged: list[tuple[MetricSpec, Any]]) -> list[_Value]:
    return [_Value(spec.step_name, spec.name, float(value), spec) for spec, value in logged]


def _read_step(table: MetricTable, packed: Any) -> list[_Value]:
    return _on_host([item for item in step_values(table, np.asarray(packed)).items() if item[0].on_step])


def _read_latest(table: MetricTable, packed: Any) -> list[_Value]:
    return _on_host([item for item in latest_values(table, np.asarray(packed)).items() if item[0].on_step])


def _read_epoch(table: MetricTable, accumulators: Any, rename: Callable[[str], str]) -> list[_Value]:
    host = np.asarray(accumulators)
    read = []
    for place, spec in enumerate(table.specs):
        if spec.on_epoch and (value := reduced(spec, place, host)) is not None:
            read.append(_Value(rename(spec.epoch_name), rename(spec.name), value, spec))
    return read
