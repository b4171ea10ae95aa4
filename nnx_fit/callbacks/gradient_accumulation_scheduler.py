"""`GradientAccumulationScheduler`: how many batches make an update, by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Changes the number of batches in an update at the beginning of epochs.

    Costs nothing when it changes: one program adds to the window and another one ends it, whatever its length. A
    window ends with its epoch.

    Args:
        scheduling: Number of batches in an update from an epoch on: `{0: 1, 4: 8}`. Before the first epoch named, 1.

    Raises:
        ConfigurationError: An epoch or a number of batches is none, or `Trainer(accumulate_grad_batches=...)` also says
            how many.

    Example:
        >>> from nnx_fit import GradientAccumulationScheduler
        >>> scheduler = GradientAccumulationScheduler({0: 1, 4: 8})
        >>> scheduler.batches_at(3), scheduler.batches_at(5)
        (1, 8)
    """

    reads_module = False
    logs = False

    def __init__(self, scheduling: Mapping[int, int]):
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise ConfigurationError(
                f"GradientAccumulationScheduler({scheduling!r}): expected a dict from epochs to numbers of batches.\n"
                "Fix: pass one such as {0: 1, 4: 8}."
            )
        for epoch, batches in scheduling.items():
            _check(scheduling, "epoch", epoch, least=0)
            _check(scheduling, "number of batches", batches, least=1)
        self.scheduling = dict(sorted(scheduling.items()))

    def batches_at(self, epoch: int) -> int:
        """Number of batches in an update in an epoch."""
        reached = [batches for first, batches in self.scheduling.items() if first <= epoch]
        return reached[-1] if reached else 1

    def updates(self, batches: int | float, epochs: int | float) -> int | float:
        """Number of updates in some epochs of `batches` each."""
        if math.isinf(batches) or math.isinf(epochs):
            return math.inf
        return sum(math.ceil(batches / self.batches_at(epoch)) for epoch in range(int(epochs)))

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Refuses a second opinion."""
        if stage == "fit" and trainer.options.accumulate_grad_batches != 1:
            raise ConfigurationError(
                f"Trainer(accumulate_grad_batches={trainer.options.accumulate_grad_batches}) and "
                "GradientAccumulationScheduler both say how many batches make an update. Fix: drop one of them."
            )

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Sets the number of this epoch."""
        trainer.accumulate_grad_batches = self.batches_at(trainer.current_epoch)


def _check(scheduling: Mapping[int, int], what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"GradientAccumulationScheduler({scheduling!r}): {value!r} is no {what}.\n"
            f"Fix: use whole numbers of at least {least}."
        )
