"""The metric that a callback watches: its value, which of two values is better, and what to say when it is missing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.callbacks.callback import Callback
    from nnx_fit.trainer import Trainer

Mode = Literal["min", "max"]


def check_mode(owner: str, mode: Any) -> Mode:
    """Returns the mode.

    Raises:
        ConfigurationError: It is neither `"min"` nor `"max"`.
    """
    if mode not in ("min", "max"):
        raise ConfigurationError(
            f'{owner}(mode={mode!r}): expected "min" (smaller is better) or "max" (larger is better).'
        )
    return mode


def better(mode: Mode, value: float, than: float) -> bool:
    """Whether one value is strictly better than another. NaN is better than nothing."""
    return value < than if mode == "min" else value > than


def worst(mode: Mode) -> float:
    """The value that every other is better than."""
    return float("inf") if mode == "min" else float("-inf")


def monitored_value(owner: str, monitor: str, trainer: Trainer) -> float:
    """The latest value of the monitored metric.

    Raises:
        ConfigurationError: Nothing was logged under that name; the message lists the names there are.
    """
    metrics = trainer.callback_metrics
    if monitor in metrics:
        return metrics[monitor]
    raise missing_metric(owner, monitor, list(metrics))


def validates_once_per_epoch(trainer: Trainer) -> bool:
    """Whether a fit that validates does so once, at the end of each epoch."""
    interval = trainer.options.val_check_interval
    # As an int it counts batches: 1 is a validation after every one of them.
    return isinstance(interval, float) and interval == 1.0 and trainer.options.check_val_every_n_epoch == 1


def check_monitored(callbacks: Sequence[Callback], names: Collection[str]) -> None:
    """Refuses a monitored metric that nothing logs.

    Args:
        callbacks: Callbacks, of which those with a `monitor` are looked at.
        names: Every name that is logged.

    Raises:
        ConfigurationError: A monitored one is not among them.
    """
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in names and getattr(callback, "strict", True):
            raise missing_metric(type(callback).__name__, monitor, list(names))


def missing_metric(owner: str, monitor: str, logged: list[str]) -> ConfigurationError:
    """The error for a monitored metric that nobody logs."""
    near = difflib.get_close_matches(monitor, logged, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigurationError(
        f"{owner}(monitor={monitor!r}): no metric of that name was logged.{hint}\n"
        f"Logged so far: {', '.join(sorted(logged)) or 'nothing'}.\n"
        f"Fix: monitor one of these, or log it with self.log({monitor!r}, ...) in a step."
    )
