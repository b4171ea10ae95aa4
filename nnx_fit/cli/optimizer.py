"""What the config groups `optimizer` and `schedule` mean to the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nnx_fit.cli.checks import shown
from nnx_fit.cli.targets import check_targets
from nnx_fit.errors import ConfigurationError
from nnx_fit.instantiation import instantiate


def make_optimizer(plain: dict[str, Any]) -> Callable[[int | float], Any] | None:
    """What the groups `optimizer` and `schedule` mean to the Trainer: a function of the number of steps."""
    optimizer, schedule = plain.get("optimizer"), plain.get("schedule")
    if optimizer is None:
        return None
    if "_target_" not in optimizer:
        raise ConfigurationError("optimizer has no _target_. Expected an option such as optimizer=adamw.")
    rate = optimizer.get("learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigurationError(f"optimizer.learning_rate={shown(rate)}: expected a number, not negative.")
    check_targets(optimizer, "optimizer")
    settings = {name: value for name, value in optimizer.items() if name != "learning_rate"}
    transform = functools.partial(_with_rate, instantiate({**settings, "_partial_": True}))
    if schedule is None:
        return lambda estimated_steps: _spec(transform, float(rate))
    if "_target_" not in schedule:
        raise ConfigurationError("schedule has no _target_. Expected an option such as schedule=cosine.")
    # An option of ours, not of the function: what a plateau watches.
    monitor = schedule.get("monitor")
    function = {name: value for name, value in schedule.items() if name != "monitor"}
    check_targets(_in_steps(function, 1), "schedule")

    def spec(estimated_steps: int | float) -> Any:
        from nnx_fit.optimizers import is_transformation

        try:
            made = instantiate(_in_steps(function, estimated_steps))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"schedule ({schedule['_target_']}): {error}") from error
        if is_transformation(made):
            return _spec(functools.partial(_followed_by, made, transform), float(rate), monitor)
        if monitor is not None:
            raise ConfigurationError(
                f"schedule.monitor={shown(monitor)} has no effect: {schedule['_target_']} follows the steps, not a "
                "metric.\nFix: schedule=plateau, or leave it out."
            )
        return _spec(transform, made)

    return spec


def _spec(transform: Callable[[Any], Any], schedule: Any, monitor: str | None = None) -> Any:
    from nnx_fit.optimizers import OptimizerSpec

    return OptimizerSpec(transform, schedule=schedule, monitor=monitor)


def _followed_by(last: Any, transform: Callable[[Any], Any], learning_rate: Any) -> Any:
    import optax

    return optax.chain(transform(learning_rate), last)


def _with_rate(transform: Callable[..., Any], learning_rate: Any) -> Any:
    return transform(learning_rate=learning_rate)


def _in_steps(schedule: dict[str, Any], estimated_steps: int | float) -> dict[str, Any]:
    """Turns the shares of the run into numbers of steps, in every argument whose name ends in `_steps`."""
    counted = dict(schedule)
    for name, value in schedule.items():
        if isinstance(value, dict):
            counted[name] = _in_steps(value, estimated_steps)
        elif name.endswith("_steps") and isinstance(value, float):
            if not 0.0 <= value <= 1.0:
                raise ConfigurationError(
                    f"schedule.{name}={value}: expected a number of steps (int) or a share of the run (float, 0 to 1)."
                )
            if estimated_steps == float("inf"):
                raise ConfigurationError(
                    f"schedule.{name}={value} is a share of the run, whose length is unknown.\n"
                    f"Fix: trainer.max_epochs=... or trainer.max_steps=..., or schedule.{name}=<number of steps>."
                )
            counted[name] = round(value * estimated_steps)
    return counted
