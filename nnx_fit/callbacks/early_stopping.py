"""`EarlyStopping`: ends a run when a metric has stopped improving. It decides; the fit loop stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.best_weights import BestWeights
from nnx_fit.callbacks.callback import Callback, Phase
from nnx_fit.callbacks.monitor import Mode, better, check_mode, missing_metric, validates_once_per_epoch, worst
from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

logger = logging.getLogger("nnx_fit")


class EarlyStopping(Callback):
    """Stops training when a metric has not improved for some checks.

    A check happens after every validation, or after every training epoch when there is none. `min_epochs` and
    `min_steps` of the Trainer outrank it: once told to, training stops where both are reached.

    With `restore_best`, the module that `fit` returns holds the values of its best check, parameters and statistics
    alike, whatever ended the training but for an error. That happens after the last hook, so that the `last` checkpoint
    is the state in which the run ended, and continues it; the values to restore are in each checkpoint, too. They are
    those that were evaluated: with an `EMAWeights`, the average.

    Differences to Lightning's: `start_from_epoch` and `restore_best` are Keras's; the latter goes by the best value,
    also where it is better by less than `min_delta`.

    Args:
        monitor: Name of the metric.
        min_delta: An improvement must be larger than this.
        patience: Number of checks without improvement after which training stops.
        mode: `"min"`: smaller is better; `"max"`: larger is better.
        verbose: Report every improvement.
        strict: Missing metrics are errors; `False` skips the check.
        check_finite: Stop when the metric becomes NaN or infinite.
        stopping_threshold: Stop once the metric is better than this.
        divergence_threshold: Stop once the metric is worse than this.
        check_on_train_epoch_end: Check after training epochs (`True`) or validations (`False`).
        start_from_epoch: Index of the epoch with the first check; what comes before neither stops nor counts.
        restore_best: At the end, put the weights of the best check into the module. Takes memory for a copy of them on
            the device and in checkpoints.

    Attributes:
        wait_count: Checks without improvement so far.
        stopped_epoch: Index of the epoch in which it stopped training, 0 if it did not.
        best_score: Best value so far, by `min_delta`.
        best_step: `global_step` of the weights that `restore_best` would restore, -1 if there are none.

    Example:
        >>> import nnx_fit as nf
        >>> nf.EarlyStopping("val/accuracy", mode="max", patience=5).best_score
        -inf
    """

    phase: ClassVar[Phase] = "decide"
    reads_module = False
    logs = False

    def __init__(
        self,
        monitor: str,
        *,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str = "min",
        verbose: bool = False,
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        start_from_epoch: int = 0,
        restore_best: bool = False,
    ):
        if not isinstance(monitor, str) or not monitor:
            raise ConfigurationError(
                f"EarlyStopping(monitor={monitor!r}): expected the name of a metric, for example "
                'EarlyStopping("val/loss").'
            )
        if not min_delta >= 0:
            raise ConfigurationError(f"EarlyStopping(min_delta={min_delta!r}): expected a number, 0 or more.")
        self.monitor = monitor
        self.mode: Mode = check_mode("EarlyStopping", mode)
        self.min_delta = min_delta
        self.patience = whole_number("EarlyStopping", "patience", patience)
        self.verbose = verbose
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.start_from_epoch = whole_number("EarlyStopping", "start_from_epoch", start_from_epoch)
        self.restore_best = restore_best
        self._best = BestWeights(self.mode)
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = worst(self.mode)
        self._decision: dict[str, Any] | None = None

    @property
    def best_step(self) -> int:
        """`global_step` of the weights that `restore_best` would restore, -1 if there are none."""
        return self._best.step

    def update(self, value: float) -> str | None:
        """Takes the metric's value at one check.

        Returns:
            Why training should stop, or `None` if it should go on.
        """
        name = self.monitor
        if self.check_finite and not math.isfinite(value):
            return f"{name} = {value} is not finite"
        if self.stopping_threshold is not None and better(self.mode, value, self.stopping_threshold):
            return f"{name} = {value:.6g} reached the stopping threshold {self.stopping_threshold:.6g}"
        if self.divergence_threshold is not None and better(self.mode, self.divergence_threshold, value):
            return f"{name} = {value:.6g} passed the divergence threshold {self.divergence_threshold:.6g}"
        margin = self.min_delta if self.mode == "min" else -self.min_delta
        if better(self.mode, value + margin, self.best_score):
            if self.verbose:
                say(f"EarlyStopping: {name} improved to {value:.6g} (best before: {self.best_score:.6g})")
            self.best_score, self.wait_count = value, 0
            return None
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return f"{name} did not improve on {self.best_score:.6g} in the last {self.wait_count} checks"
        return None

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Starts over: what another fit reached says nothing of this one. A run that continues has its state back."""
        if stage != "fit":
            return
        self.wait_count = self.stopped_epoch = 0
        self.best_score = worst(self.mode)
        self._decision = None
        self._best = BestWeights(self.mode)
        restoring = [each for each in trainer.callbacks if isinstance(each, EarlyStopping) and each.restore_best]
        if len(restoring) > 1:
            raise ConfigurationError(
                f"{len(restoring)} EarlyStopping have restore_best=True, and a module holds one set of weights.\n"
                "Fix: pass it to one of them."
            )

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Stands by what it decided before the run was cut off, unless it is asked something else now."""
        decision, self._decision = self._decision, None
        if decision is not None and decision["asked"] == self._asked():
            self._stop(trainer, decision["reason"])

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Checks after a validation, unless training epochs are what is checked after."""
        if trainer.fitting and not trainer.sanity_checking and not self._after_train_epochs(trainer):
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Checks after a training epoch, if that is the moment."""
        if self._after_train_epochs(trainer):
            self._check(trainer)

    def on_fit_end(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the best weights into the module."""
        if not self.restore_best:
            return
        if better(self.mode, self.best_score, self._best.score):
            logger.warning(
                "EarlyStopping(restore_best=True): %s was %.6g in the part of the run that this one continues, which "
                "did not keep its best weights. Fix: take them from that part's best checkpoint.",
                self.monitor,
                self.best_score,
            )
        if self._best.step >= 0:
            self._best.put_back(trainer)
            what = f"{self.monitor} = {self._best.score:.6g} at step {self._best.step}"
            say(f"EarlyStopping: the module holds the best weights, {what}.")

    def state_dict(self) -> dict[str, Any]:
        """How long it has been waiting, and for what."""
        state = {"wait_count": self.wait_count, "stopped_epoch": self.stopped_epoch, "best_score": self.best_score}
        return {**state, "best_weights": self._best.state_dict(), "decision": self._decision}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.wait_count = int(state["wait_count"])
        self.stopped_epoch = int(state["stopped_epoch"])
        self.best_score = float(state["best_score"])
        self._decision = state.get("decision")
        if self.restore_best and "best_weights" in state:
            self._best.load_state_dict(state["best_weights"])

    def arrays(self) -> dict[str, Any]:
        """The best weights, if they are to be restored."""
        return self._best.arrays if self.restore_best else {}

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Takes back what `arrays` gave."""
        if self.restore_best:
            self._best.load_arrays(arrays)

    def _after_train_epochs(self, trainer: Trainer) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        # With one validation at the end of each epoch both are the same moment, and the later one also has the
        # training metrics of that epoch.
        return not trainer.validation_enabled or validates_once_per_epoch(trainer)

    def _check(self, trainer: Trainer) -> None:
        if trainer.current_epoch < self.start_from_epoch:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            if self.strict:
                raise missing_metric("EarlyStopping", self.monitor, list(metrics))
            return
        if self.restore_best:
            self._best.offer(metrics[self.monitor], trainer)
        reason = self.update(metrics[self.monitor])
        if reason is not None:
            self.stopped_epoch = trainer.current_epoch
            self._stop(trainer, reason)

    def _stop(self, trainer: Trainer, reason: str) -> None:
        self._decision = {"reason": reason, "asked": self._asked()}
        trainer.should_stop = True
        trainer.stop_reason = f"EarlyStopping: {reason}"
        say(f"EarlyStopping: training stops, {reason}.")

    def _asked(self) -> dict[str, Any]:
        """What a decision depends on: a run that is continued with something else of it trains on."""
        own = ("monitor", "mode", "min_delta", "patience", "stopping_threshold", "divergence_threshold", "check_finite")
        return {name: getattr(self, name) for name in own}
