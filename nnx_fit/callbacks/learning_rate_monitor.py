"""`LearningRateMonitor`: logs the learning rate of every optimizer from inside the train program."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.programs.train_options import StepView
    from nnx_fit.trainer import Trainer

logger = logging.getLogger("nnx_fit")


class LearningRateMonitor(Callback):
    """Logs the learning rate with every record of step metrics: `lr`, or `lr-<name>` for named optimizers.

    It is what the update really had: the `schedule` of an `OptimizerSpec`, or the rate that `optax.inject_hyperparams`
    holds, times what `optax.contrib.reduce_on_plateau` made of it. Where none of these is there it cannot be read; one
    message then says how to make it so. A TensorBoard logger brings this callback along.

    Args:
        logging_interval: `"step"` or `None`: at every log point; `"epoch"`: once for each training epoch, the rate that
            it begins with.
        log_momentum: Also log `momentum`, or Adam's `b1`, as `lr-momentum` or `lr-<name>-momentum`.
        log_weight_decay: Also log `weight_decay`, as `lr-weight_decay` or `lr-<name>-weight_decay`. Both are read from
            `optax.inject_hyperparams`.

    Raises:
        ConfigurationError: The interval is unknown.
    """

    reads_module = False
    logs = False
    asked_for = True

    def __init__(self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False):
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigurationError(
                f'LearningRateMonitor(logging_interval={logging_interval!r}): expected "step", "epoch" or None; the '
                "number of steps between records is Trainer(log_every_n_steps=...)."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.logs = logging_interval == "epoch"

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Says which learning rates cannot be read, and what to do about it."""
        silent = [optimizer.name for optimizer in trainer.optimizers if optimizer.learning_rate is None]
        if silent:
            logger.log(
                logging.WARNING if self.asked_for else logging.INFO,
                "The learning rate%s cannot be read from Optax's state, so it is not logged. Fix: return "
                "nnx_fit.OptimizerSpec(optax.adam, schedule=1e-3) or optax.inject_hyperparams(optax.adam)(1e-3), not "
                "optax.adam(1e-3).",
                f" of {', '.join(map(repr, silent))}" if any(silent) else "",
            )

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Logs what an epoch begins with, if that is what is asked for."""
        if self.logging_interval == "epoch":
            rates = {each.name: each.learning_rate for each in trainer.optimizers if each.learning_rate is not None}
            hyperparams = {each.name: each.hyperparams for each in trainer.optimizers}
            module.log_dict(self._named(rates, hyperparams), on_step=False, on_epoch=True)

    def step_metrics(self, view: StepView) -> Mapping[str, Any]:
        """What a step was made with."""
        return {} if self.logging_interval == "epoch" else self._named(view.learning_rates, view.hyperparams)

    def _named(self, rates: Mapping[str, Any], hyperparams: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        found = {_tag(name): rate for name, rate in rates.items()}
        wanted = {"momentum": ("momentum", "b1")} if self.log_momentum else {}
        wanted |= {"weight_decay": ("weight_decay",)} if self.log_weight_decay else {}
        for name, held in hyperparams.items():
            for tag, keys in wanted.items():
                values = [held[key] for key in keys if key in held]
                found |= {f"{_tag(name)}-{tag}": value for value in values[:1]}
        return found


def _tag(name: str) -> str:
    return f"lr-{name}" if name else "lr"
