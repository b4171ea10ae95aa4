"""`OptimizerSpec` and the ways of saying which optimizer trains what, brought to one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.state.filters import Edited, Parts, PathPrefix

Schedule = float | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with what the Trainer should know about it.

    Attributes:
        tx: An `optax.GradientTransformation`, or a callable `learning_rate -> GradientTransformation`, which is given
            the `schedule`.
        schedule: The learning rate: a float or an Optax schedule (step -> learning rate). With a ready `tx` it is
            only read, for logging; with a callable `tx` it is also what the optimizer gets.
        trainable: NNX filter or dotted path prefix of the Variables this optimizer trains, but for what `freeze` took
            away; by default the module's `trainable`. Parts of several optimizers may not overlap.
        name: Name, for logging and for checkpoints; of optimizers without one, their key in a dict, and their index
            in a list of several.
        monitor: Name of a logged metric that `optax.contrib.reduce_on_plateau` in `tx` is driven by: once for each of
            its values, after the validation or the training epoch that gave it. Smaller is better. By default a
            plateau sees the loss of each update.
    """

    tx: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
    _: dataclasses.KW_ONLY
    schedule: Schedule | None = None
    trainable: Any = None
    name: str | None = None
    monitor: str | None = None

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation itself.

        Raises:
            ConfigurationError: `tx` is neither, or a callable without a `schedule`.
        """
        if is_transformation(self.tx):
            return self.tx  # type: ignore[return-value]
        if not callable(self.tx):
            raise ConfigurationError(
                f"OptimizerSpec(tx={self.tx!r}): expected an optax.GradientTransformation such as optax.adam(1e-3), or "
                "a callable learning_rate -> GradientTransformation."
            )
        if self.schedule is None:
            raise ConfigurationError(
                "OptimizerSpec(tx=<callable>) needs schedule= (a float or an Optax schedule): it is the learning rate "
                "that the callable is given."
            )
        made = self.tx(self.schedule)
        if not is_transformation(made):
            raise ConfigurationError(
                f"OptimizerSpec's tx returned a {type(made).__name__}; expected an optax.GradientTransformation."
            )
        return made


@dataclasses.dataclass(frozen=True)
class BoundOptimizer:
    """An optimizer ready to be compiled into a step.

    Attributes:
        tx: The Optax transformation.
        schedule: The learning-rate schedule, if it is known.
        name: Name, empty for a single unnamed optimizer.
        trainable: NNX filter, or `None` for the module's own.
        monitor: Name of the metric that its plateaus are driven by, or `None`.
    """

    tx: optax.GradientTransformation
    schedule: Schedule | None
    name: str
    trainable: Any
    monitor: str | None = None


def is_transformation(value: Any) -> bool:
    """Whether a value is an Optax transformation."""
    return isinstance(value, optax.GradientTransformation) or (hasattr(value, "init") and hasattr(value, "update"))


def bind(configured: Any, *, origin: str) -> tuple[BoundOptimizer, ...]:
    """Brings what `configure_optimizers` or `Trainer(optimizer=...)` gave to one form.

    Args:
        configured: A transformation, an `OptimizerSpec`, or a dict or list of those.
        origin: Where it comes from, for messages.

    Raises:
        ConfigurationError: It is none of those, or two of them have one name.
    """
    if configured is None:
        raise ConfigurationError(
            f"{origin} returned None, so nothing would train.\n"
            "Fix: return an optimizer, for example `return optax.adam(1e-3)`."
        )
    if isinstance(configured, Mapping):
        named = [_bind_one(item, str(key), f"{origin}[{key!r}]") for key, item in configured.items()]
    elif isinstance(configured, list) or (isinstance(configured, tuple) and not is_transformation(configured)):
        single = len(configured) == 1
        named = [_bind_one(item, "" if single else str(i), f"{origin}[{i}]") for i, item in enumerate(configured)]
    else:
        named = [_bind_one(configured, "", origin)]
    if not named:
        raise ConfigurationError(f"{origin} gave no optimizer, so nothing would train. Fix: give at least one.")
    names = [bound.name for bound in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(
            f"{origin} gave two optimizers of the name {twice[0]!r}. Fix: OptimizerSpec(..., name=...) names each."
        )
    return tuple(named)


def _bind_one(configured: Any, key: str, origin: str) -> BoundOptimizer:
    if not isinstance(configured, OptimizerSpec) and not is_transformation(configured):
        raise ConfigurationError(
            f"{origin} gave a {type(configured).__name__}; expected an optax.GradientTransformation (for example "
            "optax.adam(1e-3)) or an nnx_fit.OptimizerSpec."
        )
    spec = configured if isinstance(configured, OptimizerSpec) else OptimizerSpec(tx=configured)  # type: ignore[arg-type]
    return BoundOptimizer(spec.transformation(), spec.schedule, spec.name or key, _part(spec.trainable), spec.monitor)


def _part(selector: Any) -> Any:
    """A filter in which a string is what users of `freeze` mean by it, a path, or what NNX means, a tag."""
    if isinstance(selector, str):
        return nnx.Any(PathPrefix(selector), nnx.WithTag(selector))
    if isinstance(selector, list | tuple):
        return nnx.Any(*map(_part, selector))
    return selector


def trained(optimizers: Sequence[BoundOptimizer], own: Any) -> Any:
    """What optimizers train, as a filter; `None` for what the module says itself.

    Args:
        optimizers: The optimizers.
        own: The module's `trainable`.
    """
    if len(optimizers) == 1:
        return optimizers[0].trainable
    base = own.base if isinstance(own, Edited) else own  # what `freeze` takes away is taken from each of them anyway
    return Parts(tuple(base if each.trainable is None else each.trainable for each in optimizers))


def resolve(setting: Any, estimated_steps: int | float) -> Any:
    """What `Trainer(optimizer=...)` means: itself, or what a callable of `estimated_steps` returns."""
    if callable(setting) and not is_transformation(setting) and not isinstance(setting, OptimizerSpec):
        return setting(estimated_steps)
    return setting
