"""Metric objects in `self.log`: `nnx.Metric`s, and metrics that are merged, as those of metrax and CLU are.

An `nnx.Metric` is part of the module: its own state goes from batch to batch, and what counts for a loop is what
`compute()` gave last. A metric that is merged holds one batch: its state goes from batch to batch in the accumulators,
and `compute()` is of what has been merged. Both give one number, or several in a dict, a dataclass, a vector or a
matrix: its parts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.spec import MERGED, RUNNING, MetricSpec, make_spec, numeric
from nnx_fit.state import graph

# A part of more numbers has no record for each of them: it is shown, and nothing else.
MOST_NUMBERS = 1024


@dataclasses.dataclass(frozen=True)
class Part:
    """One result of a metric: a number, a vector or a matrix.

    Attributes:
        spec: How it is treated, with its own name.
        shape: Its shape; `()` for a number.
        labels: What stands at each place along each axis.
        axes: What each axis is, if that is known.
    """

    spec: MetricSpec
    shape: tuple[int, ...]
    labels: tuple[tuple[str, ...], ...] = ()
    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=int))

    def numbers(self) -> Iterator[MetricSpec]:
        """Each number that has a record of its own, in the order of the flat value."""
        if self.size <= MOST_NUMBERS:
            for labels in itertools.product(*self.labels):
                yield dataclasses.replace(self.spec, name="/".join((self.spec.name, *labels)))


@dataclasses.dataclass(frozen=True)
class ObjectSpec:
    """How one metric object is treated.

    Attributes:
        name: The user's name.
        path: Where an `nnx.Metric` is in the module; `None` for a metric that is merged.
        parts: What it computes.
        structure: Structure of the state of a metric that is merged; `None` before a trace has seen it.
    """

    name: str
    path: graph.Path | None
    parts: tuple[Part, ...]
    structure: Any = dataclasses.field(default=None, compare=False)

    @property
    def size(self) -> int:
        """How many numbers it computes."""
        return sum(part.size for part in self.parts)

    def recorded(self) -> list[MetricSpec]:
        """Every name it is recorded under; those of a matrix are in `History` only, and not among them."""
        return [spec for part in self.parts if len(part.shape) < 2 for spec in part.numbers()]

    def split(self, values: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """Its parts with their values, from all of its numbers in one vector."""
        ends = np.cumsum([part.size for part in self.parts])
        pieces = np.split(values, ends[:-1])
        return [(part, piece.reshape(part.shape)) for part, piece in zip(self.parts, pieces, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        plain = dataclasses.asdict(dataclasses.replace(self, structure=None))
        del plain["structure"]
        return plain

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ObjectSpec:
        """What `state_dict` was made of."""
        parts = tuple(
            Part(
                MetricSpec(**part["spec"]), tuple(part["shape"]), tuple(map(tuple, part["labels"])), tuple(part["axes"])
            )
            for part in state["parts"]
        )
        return cls(state["name"], None if state["path"] is None else tuple(state["path"]), parts)


def is_metric(value: Any) -> bool:
    """Whether a value is a metric object."""
    return isinstance(value, nnx.Metric) or is_merged(value)


def is_merged(value: Any) -> bool:
    """Whether a value is a metric that is merged."""
    named = all(callable(getattr(value, name, None)) for name in ("merge", "compute"))
    return named and not isinstance(value, nnx.Metric | type)


def members(metrics: Any) -> Mapping[str, Any]:
    """What `self.log_dict` logs: a mapping, or the metrics of an `nnx.MultiMetric` by name.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(metrics, nnx.MultiMetric):
        return {name: getattr(metrics, name) for name in metrics._metric_names}
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f"self.log_dict got a {type(metrics).__name__}. "
            "Fix: pass a dict of names and values, or an nnx.MultiMetric."
        )
    return metrics


def object_options(name: Any, metric: Any, defaults: tuple[bool, bool], options: Mapping[str, Any]) -> MetricSpec:
    """Checks the options of a `self.log` call with a metric object.

    Raises:
        ConfigurationError: An option makes no sense with it.
    """
    given = {key: value for key, value in options.items() if key != "batch_size"}
    useless = ["batch_size"] if options.get("batch_size") is not None else []
    useless += ["reduce"] if options.get("reduce", "mean") != "mean" else []
    if useless:
        raise ConfigurationError(
            f"self.log({name!r}, ..., {useless[-1]}={options[useless[-1]]!r}) was given a {type(metric).__name__}, "
            f"which itself says how it goes from batch to batch.\nFix: leave {' and '.join(useless)} out."
        )
    spec = make_spec(name, defaults, **given)
    return dataclasses.replace(spec, reduce=RUNNING if isinstance(metric, nnx.Metric) else MERGED)


def path_of(name: str, metric: nnx.Metric, module: Any) -> graph.Path:
    """Where a metric is in a module.

    Raises:
        ConfigurationError: It is not in there.
    """
    for path, node in graph.modules(module, nnx.Metric):
        if node is metric:
            return path
    raise ConfigurationError(
        f"self.log({name!r}, ...) got a {type(metric).__name__} that is no part of {type(module).__name__}, so nothing "
        "carries its state from batch to batch.\n"
        "Fix: make it in the module's `__init__`, `self.my_metric = ...`, and update and log that one."
    )


def check_state(name: str, metric: nnx.Metric) -> None:
    """Refuses a metric whose state has other shapes once it was updated, as those metrax wraps for a curve do.

    Raises:
        ConfigurationError: It has.
    """
    start = nnx.clone(metric)
    start.reset()
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(nnx.state(each))] for each in (start, metric)]
    if shapes[0] != shapes[1]:
        raise ConfigurationError(
            f"self.log({name!r}, ...): the state of a {type(metric).__name__} changes its shapes with the first batch, "
            "which a compiled step cannot carry.\n"
            f"Fix: of metrax, log the metric itself: `self.log(name, metrax.{type(metric).__name__}.from_model_output("
            "...))`; of your own, let `reset()` make the state as large as `update()` leaves it."
        )


def computed(spec: MetricSpec, metric: Any, module: Any) -> tuple[tuple[Part, ...], jax.Array]:
    """What a metric computes now: its parts, and all their numbers in one float32 vector.

    Args:
        spec: How the metric is treated.
        metric: The metric. Its `axis_names` say what the axes of a matrix are.
        module: The module that logs it: its `class_names`, or the metric's own, name the entries of vectors and
            matrices of that length.

    Raises:
        ConfigurationError: It cannot be computed in a program, or is nothing that can be recorded.
    """
    parts, values = [], []
    names = getattr(metric, "class_names", None) or getattr(module, "class_names", None) or ()
    axes = tuple(str(axis) for axis in getattr(metric, "axis_names", ()))
    for path, leaf in jax.tree_util.tree_flatten_with_path(_result(spec.name, metric))[0]:
        name = "/".join((spec.name, *(_key(entry) for entry in path)))
        value = numeric(name, leaf)
        shape = () if value.size == 1 else value.shape
        _check_shape(name, metric, shape, spec)
        labels = tuple(_labels(length, names) for length in shape)
        named = axes if len(axes) == len(shape) else ()
        parts.append(Part(dataclasses.replace(spec, name=name), tuple(shape), labels, named))
        values.append(value.reshape(-1).astype(jnp.float32))
    if not parts:
        raise ConfigurationError(f"self.log({spec.name!r}, ...): {type(metric).__name__}.compute() gave no value.")
    return tuple(parts), jnp.concatenate(values)


def _result(name: str, metric: Any) -> Any:
    try:
        result = metric.compute()
    except jax.errors.JAXTypeError as error:
        raise ConfigurationError(
            f"self.log({name!r}, ...): {type(metric).__name__}.compute() needs values that a compiled step does not "
            "have.\nFix: write it with jax.numpy and without Python's `if`, or log the result in an epoch's end hook."
        ) from error
    unwrapped = jax.tree.map(
        lambda leaf: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf,
        result,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return unwrapped


def _check_shape(name: str, metric: Any, shape: Sequence[int], spec: MetricSpec) -> None:
    owner = f"self.log({name!r}, ...): {type(metric).__name__}.compute() gave an array of shape {tuple(shape)}"
    if len(shape) > 2 or 0 in shape:
        raise ConfigurationError(f"{owner}. Fix: let it give numbers, vectors or matrices.")
    if shape and spec.on_step:
        raise ConfigurationError(
            f"{owner}; what is more than one number is recorded once in a loop, not in each step.\n"
            "Fix: pass on_step=False, on_epoch=True."
        )


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _labels(length: int, names: Sequence[Any]) -> tuple[str, ...]:
    found = tuple(str(name) for name in names)
    return found if len(found) == length == len(set(found)) else tuple(str(i) for i in range(length))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LoggedMetric:
    """A metric object as a step logged it.

    Attributes:
        spec: How it is treated.
        arrays: Its numbers in one vector; of a metric that is merged, the arrays of its state.
    """

    spec: ObjectSpec = dataclasses.field(metadata={"static": True})
    arrays: list[Any]

    def start(self) -> list[Any]:
        """Accumulators of this metric that hold nothing: whether there is a value and the numbers, then the state."""
        state = [] if self.spec.path is not None else jax.eval_shape(lambda x: self._merged(x, x), self.arrays)
        return [np.zeros(1 + self.spec.size, np.float32), *(np.zeros(leaf.shape, leaf.dtype) for leaf in state)]

    def added_to(self, accumulators: Sequence[Any]) -> list[Any]:
        """The accumulators after this step."""
        known, old = accumulators[0][0], list(accumulators[1:])
        if self.spec.path is not None:
            return [jnp.concatenate([jnp.ones(1), self.arrays[0]])]
        merged = self._merged(old, self.arrays)
        state = [
            jnp.where(known > 0, new, jnp.asarray(mine).astype(like.dtype)).astype(like.dtype)
            for new, mine, like in zip(merged, self.arrays, old, strict=True)
        ]
        part = self.spec.parts[0].spec
        whole = dataclasses.replace(part, name=self.spec.name)
        _, values = computed(whole, self._metric(state), None)
        return [jnp.concatenate([jnp.ones(1), values]), *state]

    def merged_with(self, other: LoggedMetric) -> LoggedMetric:
        """This metric, logged twice in one step."""
        return LoggedMetric(self.spec, self._merged(self.arrays, other.arrays))

    def _metric(self, state: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.spec.structure, state)

    def _merged(self, old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
        merged = self._metric(old).merge(self._metric(new))
        leaves, structure = jax.tree.flatten(merged)
        if structure != self.spec.structure or [jnp.shape(x) for x in leaves] != [jnp.shape(x) for x in new]:
            raise ConfigurationError(
                f"self.log({self.spec.name!r}, ...): the state of a {type(merged).__name__} grows with each batch that "
                "is merged, which a compiled step cannot carry.\nFix: log a metric whose state keeps its shapes."
            )
        return [jnp.asarray(leaf) for leaf in leaves]
