"""How a search makes an optimizer take the learning rates of its own, and how a run is given the one it found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnx_fit.callbacks.named_number import NamedNumber
from nnx_fit.errors import ConfigurationError
from nnx_fit.optimizers import OptimizerSpec, is_transformation, resolve
from nnx_fit.programs.opt_state import held_plateaus, kept_plateaus

# Steps of a schedule that are looked at to find its peak, or to see whether it changed.
LOOKED_AT = 4096


class SearchSchedule:
    """An Optax schedule that goes through given rates, and knows whether an optimizer asked for one.

    Args:
        rates: The rate of each step, shape `(steps,)`; the last one stays.

    Attributes:
        used: Whether it was called.
    """

    def __init__(self, rates: np.ndarray):
        self.used = False
        self._rates = np.asarray(rates, np.float32)

    def __call__(self, count: Any) -> jax.Array:
        """The rate of an update."""
        self.used = True
        return jnp.asarray(self._rates)[jnp.minimum(count, len(self._rates) - 1)]


def only_one(configured: Any, origin: str) -> Any:
    """The one optimizer that there is.

    Raises:
        ConfigurationError: There are several.
    """
    several = isinstance(configured, Mapping | list) or (
        isinstance(configured, tuple) and not is_transformation(configured)
    )
    if not several:
        return configured
    found = list(configured.values()) if isinstance(configured, Mapping) else list(configured)
    if len(found) != 1:
        raise ConfigurationError(
            f"LearningRateFinder: {origin} gives {len(found)} optimizers, and one rate for all of them says little.\n"
            "Fix: search with one optimizer, or choose their rates by hand."
        )
    return found[0]


def takes_schedule(configured: Any) -> bool:
    """Whether an optimizer is made with whatever schedule it is given."""
    return isinstance(configured, OptimizerSpec) and not is_transformation(configured.tx) and callable(configured.tx)


def searched(configure: Callable[[], Any], origin: str, number: NamedNumber | None, schedule: SearchSchedule) -> Any:
    """The optimizer of a search.

    Args:
        configure: Gives the optimizer of the run, as the number is at that moment.
        origin: Where it comes from, for messages.
        number: The number that is the learning rate, of the module that is trained; `None` where there is none.
        schedule: The learning rates of the search.

    Raises:
        ConfigurationError: The optimizer cannot be given other rates, or the number has nothing to do with it.
    """
    configured = only_one(configure(), origin)
    if takes_schedule(configured):
        if number is not None:
            _check_effect(configured.schedule, configure, origin, number)
        return dataclasses.replace(configured, schedule=schedule)
    if number is None:
        raise ConfigurationError(
            f"LearningRateFinder: the learning rate of {origin} cannot be changed.\n"
            "Fix: say separately what it is, for example "
            "nnx_fit.OptimizerSpec(optax.adam, schedule=1e-3) instead of optax.adam(1e-3)."
        )
    before = number.value
    number.set(schedule)
    try:
        return only_one(configure(), origin)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"LearningRateFinder: {origin} computes with `{number.label}`, which is a schedule during the search "
            f"({type(error).__name__}: {error}).\n"
            "Fix: return nnx_fit.OptimizerSpec(tx, schedule=...) with a `tx` that is given the schedule, for example "
            "OptimizerSpec(optax.adam, schedule=optax.cosine_decay_schedule(self.learning_rate, 1000))."
        ) from error
    finally:
        number.set(before)


def no_effect(origin: str, label: str) -> ConfigurationError:
    """The error for a number that the optimizer does not use."""
    return ConfigurationError(
        f"LearningRateFinder: `{label}` has no effect on what {origin} gives, so there is nothing to search.\n"
        f"Fix: make the optimizer with it (optax.adam(self.{label.partition('.')[2]})), or name the attribute that is "
        "used: LearningRateFinder(attr_name=...)."
    )


def with_resting_plateaus(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose `optax.contrib.reduce_on_plateau` reduces nothing: the rates are those of the search."""
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        never = jnp.zeros((), bool)
        made, new = inner.update(updates, held_plateaus(state, never), params, **extra)
        return made, kept_plateaus(new, state, never)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def with_peak(setting: Any, rate: float) -> Callable[[int | float], Any]:
    """A `Trainer(optimizer=...)` whose learning rate is another one.

    Args:
        setting: The setting, of one optimizer that takes a schedule.
        rate: The learning rate; that at which a schedule peaks.

    Returns:
        The setting, as a function of the estimated number of steps.
    """

    def changed(estimated_steps: int | float) -> Any:
        configured = resolve(setting, estimated_steps)
        spec = only_one(configured, "Trainer(optimizer=...)")
        spec = dataclasses.replace(spec, schedule=_peaking_at(spec.schedule, rate, estimated_steps))
        return {next(iter(configured)): spec} if isinstance(configured, Mapping) else spec

    return changed


def _peaking_at(schedule: Any, rate: float, steps: int | float) -> Any:
    scheduled: Callable[[Any], Any] = schedule
    if not callable(schedule):
        return rate
    peak = float(np.max(_values(schedule, steps)))
    if not (math.isfinite(peak) and peak > 0):
        raise ConfigurationError(
            f"LearningRateFinder: the schedule of Trainer(optimizer=...) has no peak above 0 within {steps} steps.\n"
            "Fix: pass another schedule, or LearningRateFinder(update_attr=False)."
        )
    factor = rate / peak
    return lambda step: scheduled(step) * factor


def _check_effect(schedule: Any, configure: Callable[[], Any], origin: str, number: NamedNumber) -> None:
    """Refuses a number that a schedule does not depend on: to set it would change nothing."""
    before = number.value
    number.set(2 * before if before else 1.0)
    try:
        other = only_one(configure(), origin).schedule
    finally:
        number.set(before)
    if np.array_equal(_values(schedule, LOOKED_AT), _values(other, LOOKED_AT)):
        raise no_effect(origin, number.label)


def _values(schedule: Any, steps: int | float) -> np.ndarray:
    """Values of a schedule within a number of steps: of each one, or evenly spread."""
    if not callable(schedule):
        return np.array([schedule])
    last = max(1, int(min(steps, 2**31 - 1)) - 1) if math.isfinite(steps) else LOOKED_AT
    counts = np.unique(np.linspace(0, last, LOOKED_AT).astype(np.int32))
    return np.asarray(jax.vmap(schedule)(jnp.asarray(counts)))
