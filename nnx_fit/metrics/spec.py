"""What one `self.log` call asks for: the options of a name, checked, and the value as a number."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nnx_fit.errors import ConfigurationError

Reduce = Literal["mean", "sum", "min", "max"]
REDUCTIONS: tuple[str, ...] = get_args(Reduce)

# How the parts of a metric object are treated instead: it has its own way to go from batch to batch. The step value
# of an `nnx.Metric` is that of the loop so far, the step value of a metric that is merged is the batch's own.
RUNNING, MERGED = "running", "merged"
OF_OBJECTS = (RUNNING, MERGED)


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """How one logged name is treated.

    Attributes:
        name: The user's own name.
        on_step: Whether the value of a step is recorded.
        on_epoch: Whether the values of an epoch are reduced and recorded at its end.
        prog_bar: Whether the progress bar shows it.
        logger: Whether loggers get it.
        reduce: How an epoch's values are reduced: one of `REDUCTIONS`, or of `OF_OBJECTS`.
    """

    name: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool = False
    logger: bool = True
    reduce: str = "mean"

    @property
    def records(self) -> list[str]:
        """Every name that it has records under."""
        return [self.step_name] * self.on_step + [self.epoch_name] * self.on_epoch

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


def twice(old: MetricSpec, new: MetricSpec) -> ConfigurationError:
    """The error for one name logged with two sets of options."""
    if (old.reduce in OF_OBJECTS) != (new.reduce in OF_OBJECTS):
        return ConfigurationError(
            f"self.log({new.name!r}, ...) was called with a metric object and with a value of its own.\n"
            "Fix: give one of them another name."
        )
    differing = [
        f"{field.name}={getattr(old, field.name)!r} and {field.name}={getattr(new, field.name)!r}"
        for field in dataclasses.fields(MetricSpec)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    return ConfigurationError(
        f"self.log({new.name!r}, ...) was called twice with different options: {'; '.join(differing)}.\n"
        "Fix: give one of them another name, or the same options."
    )


def scalar(name: str, value: Any) -> jax.Array:
    """A logged value as a float32 scalar.

    Raises:
        ConfigurationError: The value is no real number, or has more than one element.
    """
    array = numeric(name, value)
    if array.size != 1:
        raise ConfigurationError(
            f"self.log({name!r}, ...) got an array of shape {array.shape}; a metric is one number. "
            "Fix: reduce it first, for example with `.mean()`; or log an nnx.Metric, whose compute() may give one "
            "number for each class."
        )
    return array.reshape(()).astype(jnp.float32)


def numeric(name: str, value: Any) -> jax.Array:
    """A logged value as an array of real numbers.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        # Python's whole numbers may be larger than any of JAX's.
        array = jnp.asarray(float(value) if isinstance(value, int) else value)
    except (TypeError, ValueError, OverflowError) as error:
        hint = ' Or self.log_dict({"name": value, ...}) for several.' if isinstance(value, dict) else ""
        raise ConfigurationError(
            f"self.log({name!r}, ...) got a {type(value).__name__}, which is not a number. "
            f"Fix: log a scalar array, a float or an int.{hint}"
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool) or jnp.iscomplexobj(array):
        raise ConfigurationError(
            f"self.log({name!r}, ...) got a value of dtype {array.dtype}, which is not a real number.\n"
            "Fix: log its magnitude (`jnp.abs(x)`), or `x.real` and `x.imag` under two names."
        )
    return array


def weight_of(name: str, batch_size: Any) -> jax.Array:
    """The weight of a value in an epoch's mean, a float32 scalar.

    Raises:
        ConfigurationError: `batch_size=` is no number, or negative.
    """
    good = isinstance(batch_size, int | float | np.number | np.ndarray | jax.Array) and jnp.size(batch_size) == 1
    known = good and not isinstance(batch_size, jax.core.Tracer | jax.Array)
    if not good or isinstance(batch_size, bool) or (known and not float(np.reshape(batch_size, ())) >= 0):
        raise ConfigurationError(
            f"self.log({name!r}, ..., batch_size={batch_size!r}): expected the number of examples behind the value.\n"
            'Fix: pass a whole number, for example `batch["x"].shape[0]`.'
        )
    return jnp.reshape(jnp.asarray(batch_size, jnp.float32), ())
