"""`TrainerViews`: what users, callbacks and loggers may read off a Trainer, and the two requests they may make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_fit.errors import ConfigurationError
from nnx_fit.loops.progress import Control, Progress
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.options import Options
from nnx_fit.state.partition import StatePartition, partition

if TYPE_CHECKING:
    import jax

    from nnx_fit.loggers.logger import Logger
    from nnx_fit.loops.validation_plan import ValidationPlan
    from nnx_fit.programs.live_optimizer import LiveOptimizer
    from nnx_fit.run import Run
    from nnx_fit.state.layout import Layout


class TrainerViews:
    """Views of a run. `should_stop`, `stop_reason` and `accumulate_grad_batches` may also be set.

    Attributes:
        resumed_from: Path of the checkpoint that the fit continues from, or `None`.
    """

    options: Options
    default_root_dir: Path
    loggers: list[Logger]
    num_val_batches: list[int | float]
    resumed_from: str | None = None
    _progress: Progress
    _control: Control
    _ledger: Ledger
    _run: Run | None
    _plan: ValidationPlan | None = None

    @property
    def global_step(self) -> int:
        """Completed updates."""
        return self._progress.global_step

    @property
    def current_epoch(self) -> int:
        """Completed epochs; in an epoch's hooks, the index of that epoch."""
        return self._progress.epoch

    @property
    def total_batches(self) -> int:
        """Batches trained on in all epochs, those of a window that is not full yet among them."""
        return self._progress.batches

    @property
    def max_epochs(self) -> int | None:
        """Bound on epochs; `None` or -1 for none."""
        return self.options.max_epochs

    @property
    def max_steps(self) -> int:
        """Bound on updates; -1 for none."""
        return self.options.max_steps

    @property
    def log_every_n_steps(self) -> int:
        """Updates between two records of step metrics."""
        return self.options.log_every_n_steps

    @property
    def should_stop(self) -> bool:
        """Whether training ends at the next step boundary, once `min_epochs` and `min_steps` are reached."""
        return self._control.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._control.should_stop = bool(value)

    @property
    def stop_reason(self) -> str | None:
        """Why training ended early, for the user."""
        return self._control.stop_reason

    @stop_reason.setter
    def stop_reason(self, value: str | None) -> None:
        self._control.stop_reason = value

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches in an update. May be set in a hook, from the next batch on; see `GradientAccumulationScheduler`."""
        return self._control.accumulate

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(
                f"Trainer.accumulate_grad_batches = {value!r}: expected a whole number of at least 1. Fix: pass one."
            )
        self._control.accumulate = value

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The latest value of everything logged, also between log points. Waits for the device."""
        return self._ledger.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, float]:
        """What loggers were given last, by name."""
        return self._ledger.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest values logged with `prog_bar=True` that have arrived. Never waits."""
        return self._ledger.progress_bar_metrics

    @property
    def learning_rates(self) -> dict[str, float]:
        """The latest learning rate by name, where a `LearningRateMonitor` logs it."""
        return {name: value for name, value in self.callback_metrics.items() if name == "lr" or name.startswith("lr-")}

    @property
    def stage(self) -> str | None:
        """What is going on: `"sanity"`, `"train"`, `"validate"`, `"test"`, `"predict"`, or `None`."""
        return self._run.stage if self._run is not None else None

    @property
    def sanity_checking(self) -> bool:
        """Whether the sanity check is going on."""
        return self.stage == "sanity"

    @property
    def fitting(self) -> bool:
        """Whether the last verb is `fit`."""
        return self._run is not None and self._run.verb == "fit"

    @property
    def validation_enabled(self) -> bool:
        """Whether the fit validates."""
        return self.fitting and self._plan is not None and self._plan.run is not None

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of the sanity check, by loader."""
        count = self.options.num_sanity_val_steps
        return [batches if count == -1 else min(count, batches) for batches in self.num_val_batches]

    @property
    def module(self) -> Any:
        """The module of the last verb, or `None`."""
        return self._run.module if self._run is not None else None

    @property
    def partition(self) -> StatePartition:
        """The module's Variables by role, up to date."""
        if self._run is None:
            raise ConfigurationError("Trainer.partition: no module was run yet. Fix: call fit first.")
        self._run.show()
        return partition(self._run.module, self._run.trains)

    @property
    def logger(self) -> Logger | None:
        """The first logger, or `None`."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> Path:
        """Where the first logger with files writes; without one, the run's directory."""
        directories = [logger.log_dir for logger in self.loggers if logger.log_dir is not None]
        return directories[0] if directories else self.default_root_dir

    @property
    def compilations(self) -> list[str]:
        """Why the train program was compiled, each time."""
        program = self._run.train_program if self._run is not None else None
        return program.compilations if program is not None else []

    @property
    def optimizers(self) -> list[LiveOptimizer]:
        """The optimizers of a fit, from `on_train_start` on: their learning rates and hyperparameters."""
        program = self._run.train_program if self._run is not None else None
        return program.optimizers if program is not None else []

    @property
    def layout(self) -> Layout | None:
        """Role and place of each of the module's arrays: another object after a hook changed the module."""
        live = self._run.live if self._run is not None else None
        return live.layout if live is not None else None

    def when_ready(self, array: jax.Array, function: Callable[[], None]) -> None:
        """Calls a function once an array has arrived on the host: after some later step, or when training ends.

        Neither the run nor the caller waits for the device. Functions are called in the order they were given in.

        Args:
            array: What the function is about to read; it must not be donated meanwhile.
            function: Takes no arguments.
        """
        self._ledger.defer([array], function)

    def peek(self, selector: Any) -> dict[str, Any]:
        """The live arrays of the Variables that a filter matches, without bringing the module up to date.

        Args:
            selector: An NNX filter.

        Returns:
            Arrays by dotted path. The next step donates them: dispatch work on them at once, and keep none.
        """
        return self._run.peek(selector) if self._run is not None else {}
