"""The metric ledger: device vectors in, host values out, late and in order.

Programs hand in the packed metrics of steps and the accumulators of epochs without waiting. The ledger starts their
copy to the host where a record is due, and publishes each record (to History, loggers, and the `*_metrics` views)
once it has arrived. Only somebody who asks for a value waits for it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nnx_fit.metrics.capture import MetricSpec, MetricTable
from nnx_fit.metrics.history import History
from nnx_fit.metrics.host import HostMetrics
from nnx_fit.metrics.reduction import Accumulators, latest_values, step_values
from nnx_fit.metrics.values import Picture, Value, read_epoch

Publish = Callable[[dict[str, float], int], None]
# Takes a tag, a function that draws, and the step; what is drawn is an image, or `None`.
Show = Callable[[str, Callable[[], "np.ndarray | None"], int], None]


@dataclasses.dataclass
class _Record:
    """Values on their way to the host, and how to read them once they are there; a quiet one is not recorded."""

    step: int
    arrays: Sequence[Any]
    read: Callable[[], Sequence[Value | Picture]]
    quiet: bool = False


@dataclasses.dataclass
class _Deferred:
    """Something else that waits for the device."""

    arrays: Sequence[Any]
    call: Callable[[], None]


class Ledger:
    """Everything that is logged in a run.

    Args:
        history: Where every record is kept.
        publish: Hands a record's loggable values and its step to the loggers.
        show: Hands the pictures of class-wise metrics to the loggers.

    Attributes:
        host: What host hooks log, by the kind of loop they belong to: `"train"` or `"eval"`.
    """

    def __init__(self, history: History, publish: Publish, show: Show | None = None):
        self.history = history
        self.host = {"train": HostMetrics(), "eval": HostMetrics()}
        self._publish = publish
        self._show = show
        self._pending: collections.deque[_Record | _Deferred] = collections.deque()
        self._callback: dict[str, float] = {}
        self._progress: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._latest: tuple[MetricTable, Any] | None = None
        self._recent: collections.deque[tuple[MetricTable, Any]] = collections.deque(maxlen=4)
        self._eval_steps = self._eval_steps_before = 0

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

    def log_eval_step(self, step: int, table: MetricTable, packed: Any, rename: Callable[[str], str]) -> None:
        """Makes a record of an eval batch's metrics, where some are to be recorded for each."""
        if any(spec.on_step for spec in table.specs):
            self._eval_steps += 1
            again = self._eval_steps <= self._eval_steps_before
            packed.copy_to_host_async()
            self._pending.append(_Record(step, [packed], lambda: _renamed(_read_step(table, packed), rename), again))
            self.poll()

    def log_host_step(self, step: int) -> None:
        """Makes a record of what batch hooks logged since the last one."""
        logged = self.host["train"].take_step()
        if logged:
            self._pending.append(_Record(step, [value for _, value in logged], lambda: _on_host(logged)))

    def log_epoch(
        self, step: int, table: MetricTable, accumulators: Accumulators, rename: Callable[[str], str]
    ) -> None:
        """Makes a record of an epoch's reduced metrics."""
        if self._latest is not None and self._latest[0] is table:
            # From now on the epoch's values are the latest ones of metrics that have both.
            last, self._latest = self._latest[1], None
            self._recent.clear()
            self._pending.append(_Record(step, [last], lambda: _read_latest(table, last), quiet=True))
        if not table.has_epoch:
            return
        accumulators.copy_to_host_async()
        self._pending.append(_Record(step, accumulators.results, lambda: read_epoch(table, accumulators, rename)))

    def log_host_epoch(self, stage: str, step: int) -> dict[str, float]:
        """Makes a record of what the hooks of an epoch logged, and returns it; `stage` is `"train"` or `"eval"`."""
        host = self.host[stage]
        if stage == "eval":
            self._eval_steps = self._eval_steps_before = 0
        values = [*(_on_host(host.take_step()) if stage == "eval" else []), *host.take_epoch()]
        if values:
            self._pending.append(_Record(step, [], lambda: values))
        return {value.record: value.value for value in values if isinstance(value, Value) and not value.detail}

    def defer(self, arrays: Sequence[Any], call: Callable[[], None]) -> None:
        """Has something called, in turn, once arrays have arrived on the host; their copy is started here."""
        for array in arrays:
            array.copy_to_host_async()
        self._pending.append(_Deferred(arrays, call))

    def forget_host(self, stage: str) -> None:
        """Drops what the hooks of an epoch logged."""
        self.host[stage] = HostMetrics()

    def forget_host_epoch(self, stage: str) -> None:
        """Drops what the hooks of an epoch logged for its end, and keeps what waits for the next log point."""
        self.host[stage].take_epoch()

    @contextmanager
    def unrecorded(self, stage: str) -> Iterator[None]:
        """Drops what hooks log while the block runs, and keeps what they had logged before."""
        kept, self.host[stage] = self.host[stage], HostMetrics()
        try:
            yield
        finally:
            self.host[stage] = kept

    def read_epoch(
        self, table: MetricTable, accumulators: Accumulators, rename: Callable[[str], str]
    ) -> dict[str, float]:
        """An epoch's reduced metrics as values, without recording them. Waits for the device."""
        values = read_epoch(table, accumulators, rename)
        return {value.own: value.value for value in values if isinstance(value, Value) and not value.detail}

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
            # Of a validation that is under way, and that a run which continues begins again.
            "eval_steps": max(self._eval_steps, self._eval_steps_before),
            "callback": self.callback_metrics,
            "progress": self.progress_bar_metrics,
            "logged": self.logged_metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.host["train"].load_state_dict(state["host"])
        self._eval_steps_before = state.get("eval_steps", 0)
        self._callback = dict(state["callback"])
        self._progress = dict(state["progress"])
        self._logged = dict(state["logged"])

    def _release(self, record: _Record | _Deferred) -> None:
        if isinstance(record, _Deferred):
            record.call()
            return
        read = record.read()
        values = [value for value in read if isinstance(value, Value)]
        for value in values:
            if not value.detail:
                self._callback[value.record] = self._callback[value.own] = value.value
            if value.spec.prog_bar and not value.detail:
                self._progress[value.own] = value.value
        if record.quiet:
            return
        self.history.append(record.step, {value.record: value.value for value in values})
        loggable = {value.record: value.value for value in values if value.spec.logger and not value.detail}
        if loggable:
            self._logged |= loggable
            self._publish(loggable, record.step)
        if self._show is not None:
            for picture in (each for each in read if isinstance(each, Picture)):
                self._show(picture.tag, picture.draw, record.step)


def _ready(arrays: Sequence[Any]) -> bool:
    return all(array.is_ready() for array in arrays if hasattr(array, "is_ready"))


def _on_host(logged: list[tuple[MetricSpec, Any]]) -> list[Value]:
    return [Value(spec.step_name, spec.name, float(value), spec) for spec, value in logged]


def _renamed(values: list[Value], rename: Callable[[str], str]) -> list[Value]:
    return [dataclasses.replace(each, record=rename(each.record), own=rename(each.own)) for each in values]


def _read_step(table: MetricTable, packed: Any) -> list[Value]:
    return _on_host([item for item in step_values(table, np.asarray(packed)).items() if item[0].on_step])


def _read_latest(table: MetricTable, packed: Any) -> list[Value]:
    return _on_host([item for item in latest_values(table, np.asarray(packed)).items() if item[0].on_step])
