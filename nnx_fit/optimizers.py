"""`OptimizerSpec` and the ways of saying which optimizer trains what, brought to one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from nnx_fit.errors import ConfigurationError

Schedule = float | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with what the Trainer should know about it.

    Attributes:
        tx: An `optax.GradientTransformation`, or a callable `learning_rate -> GradientTransformation`, which is given
            the `schedule`.
        schedule: The learning rate: a float or an Optax schedule (step -> learning rate). With a ready `tx` it is
            only read, for logging; with a callable `tx` it is also what the optimizer gets.
        trainable: NNX filter of the Variables this optimizer trains, but for what `freeze` took away; by default the
            module's `trainable`.
        name: Name, for logging and for checkpoints; needed when there are several.
    """

    tx: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
    _: dataclasses.KW_ONLY
    schedule: Schedule | None = None
    trainable: Any = None
    name: str | None = None

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
    """

    tx: optax.GradientTransformation
    schedule: Schedule | None
    name: str
    trainable: Any

    def learning_rate(self, opt_state: Any, step: Any) -> Any | None:
        """The learning rate of an update, traced; `None` where it cannot be read.

        Args:
            opt_state: Optimizer state after the update, which holds the hyperparameters that the update used.
            step: Number of updates completed before this one.
        """
        if self.schedule is not None:
            return jnp.asarray(self.schedule(step) if callable(self.schedule) else self.schedule, jnp.float32)
        hyperparams = _hyperparams(opt_state)
        return hyperparams.get("learning_rate") if hyperparams else None


def is_transformation(value: Any) -> bool:
    """Whether a value is an Optax transformation."""
    return isinstance(value, optax.GradientTransformation) or (hasattr(value, "init") and hasattr(value, "update"))


def bind(configured: Any, *, origin: str) -> BoundOptimizer:
    """Brings what `configure_optimizers` or `Trainer(optimizer=...)` gave to one form.

    Args:
        configured: A transformation or an `OptimizerSpec`.
        origin: Where it comes from, for messages.

    Raises:
        ConfigurationError: It is none of those.
    """
    if configured is None:
        raise ConfigurationError(
            f"{origin} returned None, so nothing would train.\n"
            "Fix: return an optimizer, for example `return optax.adam(1e-3)`."
        )
    if isinstance(configured, Mapping | list) or (isinstance(configured, tuple) and not is_transformation(configured)):
        if len(configured) != 1:
            raise ConfigurationError(
                f"{origin} gave {len(configured)} optimizers; training with several is not supported yet.\n"
                "Fix: return one optimizer; optax.multi_transform gives parts of the parameters settings of their own."
            )
        name, only = next(iter(configured.items())) if isinstance(configured, Mapping) else ("", configured[0])
        bound = bind(only, origin=origin)
        return dataclasses.replace(bound, name=bound.name or name)
    spec = configured if isinstance(configured, OptimizerSpec) else OptimizerSpec(tx=configured)  # type: ignore[arg-type]
    if not isinstance(configured, OptimizerSpec) and not is_transformation(configured):
        raise ConfigurationError(
            f"{origin} gave a {type(configured).__name__}; expected an optax.GradientTransformation (for example "
            "optax.adam(1e-3)) or an nnx_fit.OptimizerSpec."
        )
    return BoundOptimizer(spec.transformation(), spec.schedule, spec.name or "", spec.trainable)


def resolve(setting: Any, estimated_steps: int | float) -> Any:
    """What `Trainer(optimizer=...)` means: itself, or what a callable of `estimated_steps` returns."""
    if callable(setting) and not is_transformation(setting) and not isinstance(setting, OptimizerSpec):
        return setting(estimated_steps)
    return setting


def _hyperparams(opt_state: Any) -> Mapping[str, Any] | None:
    """The hyperparameters that `optax.inject_hyperparams` keeps in its state, wherever it is nested."""
    if hasattr(opt_state, "hyperparams"):
        return opt_state.hyperparams
    if isinstance(opt_state, tuple):
        for inner in opt_state:
            if (found := _hyperparams(inner)) is not None:
                return found
    return None
