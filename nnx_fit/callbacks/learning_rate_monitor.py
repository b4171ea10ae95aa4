"""`LearningRateMonitor`: logs the learning rate of every optimizer from inside the train program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.programs.train_options import StepView


class LearningRateMonitor(Callback):
    """Logs the learning rate with every record of step metrics: `lr`, or `lr-<name>` for named optimizers.

    It is read where it can be: from the `schedule` of an `OptimizerSpec`, or from `optax.inject_hyperparams`.

    Args:
        logging_interval: `"step"` or `None`: at every log point.
    """

    reads_module = False
    logs = False

    def __init__(self, logging_interval: str | None = None):
        if logging_interval not in (None, "step"):
            raise ConfigurationError(
                f'LearningRateMonitor(logging_interval={logging_interval!r}): expected "step" or None; the interval '
                "between records is Trainer(log_every_n_steps=...)."
            )
        self.logging_interval = logging_interval

    def step_metrics(self, view: StepView) -> Mapping[str, Any]:
        """The learning rates of the step."""
        return {f"lr-{name}" if name else "lr": rate for name, rate in view.learning_rates.items()}
