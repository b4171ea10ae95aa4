"""What a step logs: `self.log` inside a trace records scalars here, and the program packs them into small vectors.

Capturing happens once per trace; running the compiled step costs nothing on the host. The `MetricTable` gives every
name a fixed place, shared by all programs of a stage, so that a ragged last batch or a branch taken later lands in the
same accumulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import ConfigurationError

Reduce = Literal["mean", "sum", "min", "max"]
REDUCTIONS: tuple[str, ...] = get_args(Reduce)


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """How one logged name is treated.

    Attributes:
        name: The user's own name.
        on_step: Whether the value of a step is recorded.
        on_epoch: Whether the values of an epoch are reduced and recorded at its end.
        prog_bar: Whether the progress bar shows it.
        logger: Whether loggers get it.
        reduce: How an epoch's values are reduced.
    """

    name: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool = False
    logger: bool = True
    reduce: Reduce = "mean"

    @property
    def step_name(self) -> str:
        """Name of a step's record."""
        return f"{self.name}_step" if self.on_epoch else self.name

    @property
    def epoch_name(self) -> str:
        """Name of an epoch's record."""
        return f"{self.name}_epoch" if self.on_step else self.name


def make_spec(
    name: Any,
    defaults: tuple[bool, bool],
    *,
    on_step: bool | None = None,
    on_epoch: bool | None = None,
    prog_bar: bool = False,
    logger: bool = True,
    reduce: Any = "mean",
) -> MetricSpec:
    """Checks the options of one `self.log` call.

    Args:
        name: Name of the metric.
        defaults: The hook's own (`on_step`, `on_epoch`).
        on_step: Overrides the hook's default.
        on_epoch: Overrides the hook's default.
        prog_bar: Show in the progress bar.
        logger: Hand to loggers.
        reduce: Reduction over an epoch.

    Raises:
        ConfigurationError: A name that is no string, an unknown reduction, or neither `on_step` nor `on_epoch`.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"self.log needs a name (a non-empty string), got {name!r}.")
    if reduce not in REDUCTIONS:
        raise ConfigurationError(
            f"self.log({name!r}, reduce={reduce!r}): unknown reduction. Use one of {', '.join(map(repr, REDUCTIONS))}."
        )
    step = defaults[0] if on_step is None else on_step
    epoch = defaults[1] if on_epoch is None else on_epoch
    if not step and not epoch:
        raise ConfigurationError(
            f"self.log({name!r}, on_step=False, on_epoch=False) would record nothing. Fix: set one of them to True."
        )
    return MetricSpec(name, bool(step), bool(epoch), bool(prog_bar), bool(logger), reduce)


def scalar(name: str, value: Any) -> jax.Array:
    """A logged value as a float32 scalar.

    Raises:
        ConfigurationError: The value is not numeric or has more than one element.
    """
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"self.log({name!r}, ...) got a {type(value).__name__}, which is not a number. "
            "Fix: log a scalar array, a float or an int."
        ) from error
    if array.size != 1:
        raise ConfigurationError(
            f"self.log({name!r}, ...) got an array of shape {array.shape}; a metric is one number. "
            "Fix: reduce it first, for example with `.mean()`."
        )
    return array.reshape(()).astype(jnp.float32)


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
    """

    def __init__(
        self,
        hook: str,
        defaults: tuple[bool, bool] | None,
        batch_size: Callable[[], Any],
        inputs: Any = None,
    ):
        self._hook = hook
        self._defaults = defaults
        self._batch_size = batch_size
        self._traces = None if inputs is None else {id(trace) for trace in _traces(inputs)}
        self.entries: dict[str, _Entry] = {}

    def log(self, name: str, value: Any, *, batch_size: Any = None, **options: Any) -> None:
        """Records one metric; several values of one name in one step are reduced with each other."""
        if self._defaults is None:
            raise ConfigurationError(
                f"self.log({name!r}, ...) was called in {self._hook}, which has no metrics. Fix: return the value."
            )
        spec = make_spec(name, self._defaults, **options)
        weight: Any = 1.0
        if spec.on_epoch and spec.reduce == "mean":
            weight = self._batch_size() if batch_size is None else batch_size
        entry = _Entry(spec, scalar(name, value), jnp.asarray(weight, jnp.float32))
        self._check_not_nested(name, entry.value, entry.weight)
        self._add(entry)

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
        if new.spec.reduce == "mean":
            weight = old.weight + new.weight
            old.value = (old.value * old.weight + new.value * new.weight) / weight
            old.weight = weight
        else:
            combine = {"sum": jnp.add, "min": jnp.minimum, "max": jnp.maximum}[new.spec.reduce]
            old.value = combine(old.value, new.value)

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


def twice(old: MetricSpec, new: MetricSpec) -> ConfigurationError:
    """The error for one name logged with two sets of options."""
    differing = [
        f"{field.name}={getattr(old, field.name)!r} and {field.name}={getattr(new, field.name)!r}"
        for field in dataclasses.fields(MetricSpec)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    return ConfigurationError(
        f"self.log({new.name!r}, ...) was called twice with different options: {'; '.join(differing)}.\n"
        "Fix: give one of them another name, or the same options."
    )


class TooManyMetrics(Exception):  # noqa: N818 - control flow of a trace, never seen by a user
    """More names were logged than the accumulators have places for: grow them and trace again."""


class MetricTable:
    """The place of every metric name in a stage's vectors; names are only ever added.

    Attributes:
        capacity: Number of places in the vectors.
        specs: The metrics in order of their places.
    """

    def __init__(self, capacity: int = 32):
        self.capacity = capacity
        self.specs: list[MetricSpec] = []
        self._places: dict[str, int] = {}

    def place(self, spec: MetricSpec) -> int:
        """Where a metric goes, giving it the next place when it is new."""
        index = self._places.get(spec.name)
        if index is None:
            if len(self.specs) == self.capacity:
                raise TooManyMetrics
            index = self._places[spec.name] = len(self.specs)
            self.specs.append(spec)
        elif self.specs[index] != spec:
            raise twice(self.specs[index], spec)
        return index

    def grow(self) -> None:
        """Doubles the capacity."""
        self.capacity *= 2

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
        """Which places belong to these names, boolean, shape `(capacity,)`."""
        places = np.zeros(self.capacity, bool)
        places[[self._places[name] for name in names]] = True
        return places

    def reduction_is(self, *reductions: str) -> np.ndarray:
        """Which places have one of these reductions, boolean, shape `(capacity,)`."""
        flags = [spec.reduce in reductions for spec in self.specs]
        return np.array(flags + [False] * (self.capacity - len(flags)))
