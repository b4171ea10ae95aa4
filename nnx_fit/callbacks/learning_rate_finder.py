"""`LearningRateFinder`: a learning rate to begin with, found by a short trial before a run begins."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.finder import Finder, GivenData
from nnx_fit.callbacks.learning_rate_control import (
    SearchSchedule,
    no_effect,
    searched,
    with_peak,
    with_resting_plateaus,
)
from nnx_fit.callbacks.learning_rate_curve import GROWTH_MODES, LearningRateCurve, rates_between
from nnx_fit.callbacks.named_number import NamedNumber, find_number, is_number
from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError
from nnx_fit.module import FitModule
from nnx_fit.optimizers import BoundOptimizer, bind, resolve
from nnx_fit.trial import Trial

if TYPE_CHECKING:
    from nnx_fit.run import Run
    from nnx_fit.trainer import Trainer

logger = logging.getLogger("nnx_fit")

USUAL_NAMES = ("learning_rate", "lr")


class LearningRateFinder(Finder):
    """Finds a learning rate by a range test, and uses it.

    Before `fit` takes its optimizer, a copy of the module is trained for some steps, while the learning rate grows from
    `min_lr` to `max_lr`. What is suggested is the rate at which the loss fell fastest. The run that follows is the one
    that would have been, had that rate been given from the beginning: the trial leaves the module, its random streams,
    the loaders' positions, the loggers and all other callbacks alone. A run that continues keeps the rate that it has.

    *Which rate it is.* Of a module with `configure_optimizers`: its attribute `attr_name` (an entry of `hparams` of
    that name follows it), by default `learning_rate` or `lr`. Of `Trainer(optimizer=...)`: the `schedule` of its
    `OptimizerSpec`, and where that is no number, its peak: the schedule is scaled.

    *How it grows.* An `OptimizerSpec` whose `tx` is a callable is given the rates of the search in place of its own
    schedule, warm-up and decay included. Otherwise the attribute is an Optax schedule while `configure_optimizers` is
    called on the copy: what is made with it must take schedules, as all of Optax's optimizers do. An
    `optax.contrib.reduce_on_plateau` rests.

    The curve is saved in `Trainer.default_root_dir` as `lr_find.csv` and, where matplotlib is installed (`pip install
    'nnx-fit[plots]'`), as `lr_find.png`, which is also handed to the loggers when training begins.

    Differences to Lightning: a constant loss is reported constant (there it appears to double at first); a loss that
    falls nowhere suggests nothing, and neither does a slope in units of the rate, which is steepest where the rate is
    tiniest, count: it is the slope per step; both `min_lr` and `max_lr` are tried; a loss that is not finite ends the
    search, and one below zero does not; there is no validation within it; several batches of an accumulation window
    count by their mean; the search comes before the run and cannot be called within it.

    Args:
        min_lr: The first learning rate.
        max_lr: The last one.
        num_training_steps: Number of updates from the first to the last.
        mode: `"exponential"`: the rate grows by equal ratios; `"linear"`: by equal differences.
        early_stop_threshold: The search ends when the smoothed loss is this many times the smallest so far; `None`:
            only when it is not finite.
        update_attr: Use the suggestion. `False` only looks.
        attr_name: Name of the module's attribute, or a dotted path to it.

    Attributes:
        results: The curve of the last search, or `None`: `results.lr`, `results.loss`, `results.suggestion()`,
            `results.plot(suggest=True)`.
        optimal_lr: What it suggested, or `None`.

    Raises:
        ConfigurationError: An argument is invalid, the learning rate cannot be found or cannot be changed, or there are
            several optimizers.

    Example:
        >>> import nnx_fit as nf
        >>> from nnx_fit.callbacks.learning_rate_finder import LearningRateFinder
        >>> finder = LearningRateFinder(min_lr=1e-6, num_training_steps=200)
        >>> trainer = nf.Trainer(max_epochs=5, callbacks=finder, logger=False)
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ):
        if mode not in GROWTH_MODES:
            raise ConfigurationError(f'LearningRateFinder(mode={mode!r}): expected "exponential" or "linear".')
        if not (is_number(min_lr) and is_number(max_lr) and 0 < min_lr < max_lr):
            raise ConfigurationError(
                f"LearningRateFinder(min_lr={min_lr!r}, max_lr={max_lr!r}): expected numbers above 0, the first below "
                "the second."
            )
        if early_stop_threshold is not None and not (is_number(early_stop_threshold) and early_stop_threshold > 1):
            raise ConfigurationError(
                f"LearningRateFinder(early_stop_threshold={early_stop_threshold!r}): expected a number above 1 or None."
            )
        self.min_lr, self.max_lr = float(min_lr), float(max_lr)
        self.num_training_steps = whole_number("LearningRateFinder", "num_training_steps", num_training_steps, least=2)
        self.mode = mode
        self.early_stop_threshold = early_stop_threshold
        self.update_attr = update_attr
        self.attr_name = attr_name
        self.results: LearningRateCurve | None = None
        self.optimal_lr: float | None = None
        self._figure: Any = None

    def find(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Searches, and sets the rate that was suggested."""
        if data.verb != "fit":
            return
        self._rate_of(module)  # a mistake in its name shows before anything is tried
        rates = rates_between(self.min_lr, self.max_lr, self.num_training_steps, self.mode)  # type: ignore[arg-type]
        curve = LearningRateCurve(self.mode)  # type: ignore[arg-type]
        choice = _Choice(self._rate_of, trainer._optimizer, rates)
        Trial(
            trainer,
            data,
            [_Recorder(curve, rates, self.early_stop_threshold, choice.check)],
            choose_optimizers=choice,
            max_steps=self.num_training_steps,
            limit_val_batches=0,
            steps_per_call=1,
        ).run(module)
        self.results, self.optimal_lr = curve, curve.suggestion()
        self._report(trainer)
        self.adopt(trainer, module, data)

    def adopt(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Sets the rate that was suggested, now or in the run that this one continues."""
        if self.optimal_lr is None or not self.update_attr or data.verb != "fit":
            return
        number = self._rate_of(module)
        if number is not None:
            number.set(self.optimal_lr)
        else:
            trainer._optimizer = with_peak(trainer._optimizer, self.optimal_lr)

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Waits for the first step, if there is a plot to log."""
        self.paused_until = sys.maxsize if self._figure is None else 0

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hands the plot to the loggers: now that a step was made, the run is one that leaves records."""
        figure, self._figure, self.paused_until = self._figure, None, sys.maxsize
        if figure is not None:
            for each in trainer.loggers:
                each.log_figure("lr_find", figure, 0)

    def state_dict(self) -> dict[str, Any]:
        """The curve and the suggestion."""
        curve = None if self.results is None else self.results.state_dict()
        return {"optimal_lr": self.optimal_lr, "results": curve}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.optimal_lr = state["optimal_lr"]
        self.results = None if state["results"] is None else LearningRateCurve.of_state(state["results"])

    def _rate_of(self, module: FitModule) -> NamedNumber | None:
        """The number that is a module's learning rate; `None` where the optimizer is the Trainer's.

        Raises:
            ConfigurationError: There should be one and there is none.
        """
        name = type(module).__name__
        if type(module).configure_optimizers is FitModule.configure_optimizers:
            if self.attr_name:
                raise ConfigurationError(
                    f"LearningRateFinder(attr_name={self.attr_name!r}): {name} has no configure_optimizers that would "
                    "use it. Fix: leave attr_name out; the rate is that of Trainer(optimizer=...)."
                )
            return None
        names = (self.attr_name,) if self.attr_name else USUAL_NAMES
        found = [number for each in names if (number := find_number(module, "module", each)) is not None]
        if not found:
            raise ConfigurationError(
                f"LearningRateFinder: {name} has no number named {' or '.join(map(repr, names))}, as attribute or in "
                "hparams.\nFix: set `self.learning_rate` in __init__ and use it in configure_optimizers, or name the "
                "attribute: LearningRateFinder(attr_name=...)."
            )
        return found[0]

    def _report(self, trainer: Trainer) -> None:
        """Says what was found and writes it down."""
        assert self.results is not None
        steps = f"{len(self.results.lr)} steps"
        if self.optimal_lr is None:
            logger.warning(
                "LearningRateFinder: no suggestion after %s: the loss fell nowhere, or there are too few steps (the "
                "first 10 and the last do not count). The learning rate stays.",
                steps,
            )
        if jax.process_index() != 0:
            return
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.results.write_csv(directory / "lr_find.csv")
        shown = "lr_find.csv"
        try:
            self._figure = self.results.plot(suggest=True)
        except ConfigurationError as error:
            say(f"LearningRateFinder: no plot. {error}")
        else:
            shown = "lr_find.png"
            self._figure.savefig(directory / shown)
        if self.optimal_lr is not None:
            say(f"LearningRateFinder: {self.optimal_lr:.3g} after {steps} ({shown} in the run's directory).")


class _Choice:
    """The optimizer of the trial: the run's, with the learning rates of the search.

    Args:
        rate_of: Gives the number that is a module's learning rate.
        setting: `Trainer(optimizer=...)`.
        rates: The learning rates of the search.
    """

    def __init__(self, rate_of: Callable[[Any], NamedNumber | None], setting: Any, rates: np.ndarray):
        self._rate_of = rate_of
        self._setting = setting
        self._schedule = SearchSchedule(rates)
        self._origin = self._label = ""

    def __call__(self, run: Run, usual: Callable[[], tuple[BoundOptimizer, ...]]) -> tuple[BoundOptimizer, ...]:
        usual()  # refuses what is no optimizer at all
        number = self._rate_of(run.module)
        if number is None:
            self._origin = "Trainer(optimizer=...)"
            steps = run.trainer.estimated_steps
            configured = searched(lambda: resolve(self._setting, steps), self._origin, None, self._schedule)
        else:
            self._origin, self._label = f"{type(run.module).__name__}.configure_optimizers", number.label
            configured = searched(run.module.configure_optimizers, self._origin, number, self._schedule)
        (bound,) = bind(configured, origin=self._origin)
        return (dataclasses.replace(bound, tx=with_resting_plateaus(bound.tx), monitor=None),)

    def check(self) -> None:
        """Refuses an optimizer that made an update without asking for its learning rate."""
        if not self._schedule.used:
            raise no_effect(self._origin, self._label)


class _Recorder(Callback):
    """Keeps the loss of each update, and ends the trial when there is no use in going on."""

    reads_module = False
    logs = False

    def __init__(self, curve: LearningRateCurve, rates: np.ndarray, threshold: float | None, check: Callable[[], None]):
        self._curve = curve
        self._rates = rates
        self._threshold = threshold
        self._check = check
        self._window: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes the loss of a batch, and with the last one of a window that of the update."""
        if not isinstance(outputs, Mapping) or outputs.get("loss") is None:
            raise ConfigurationError(
                f"LearningRateFinder: {type(module).__name__}.training_step returned no loss to go by.\n"
                "Fix: return the loss, or a dict with it under 'loss'."
            )
        self._window.append(float(outputs["loss"]))
        done = len(self._curve.lr)
        if trainer.global_step > done:
            self._check()
            self._curve.add(self._rates[done], float(np.mean(self._window)))
            self._window = []
        elif np.isfinite(self._window[-1]):
            return  # an update is not complete, or was skipped since its gradients overflowed
        else:
            self._curve.add(self._rates[done], self._window[-1])
        if self._curve.diverges(self._threshold):
            trainer.should_stop = True
