"""`TrainerData`: the data of each verb, found, checked and counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from nnx_fit.data.datamodule import DataModule, has_loader
from nnx_fit.data.sources import Source, find_loaders, make_source
from nnx_fit.errors import ConfigurationError
from nnx_fit.loops.progress import Progress
from nnx_fit.module import FitModule
from nnx_fit.options import Options

logger = logging.getLogger("nnx_fit")


class TrainerData:
    """Finds the batches of a verb.

    Attributes:
        num_training_batches: Batches of an epoch; `inf` where it is unknown.
        num_val_batches: Batches of a validation, by loader.
        num_test_batches: Batches of a test, by loader.
        num_predict_batches: Batches of a prediction, by loader.
        estimated_steps: Updates that the fit will make; `inf` where it is unknown.
    """

    options: Options
    callbacks: list[Callback]
    _progress: Progress

    def __init__(self) -> None:
        self.num_training_batches: int | float = 0
        self.num_val_batches: list[int | float] = []
        self.num_test_batches: list[int | float] = []
        self.num_predict_batches: list[int | float] = []
        self.estimated_steps: int | float = 0

    def _train_source(self, given: Any, datamodule: Any, module: Any) -> Source:
        options = self.options
        name = "overfit_batches" if options.overfit_batches else "limit_train_batches"

        def ask() -> Source:
            loaders = find_loaders("train", given, datamodule, module)
            if loaders is None:
                raise ConfigurationError(
                    "Trainer.fit has no training data. Fix: pass train_dataloaders=, or a datamodule with "
                    "train_dataloader()."
                )
            repeated = bool(options.overfit_batches)
            source = make_source("train", loaders, options.limit_train_batches, name, repeated=repeated)
            self.num_training_batches = source.limits[0]
            return source

        if options.reload_dataloaders_every_n_epochs and given is not None:
            logger.warning(
                "Trainer(reload_dataloaders_every_n_epochs=%d): loaders were passed to fit, and there is nobody to ask "
                "for others. Fix: pass a DataModule, or define train_dataloader in the module.",
                options.reload_dataloaders_every_n_epochs,
            )
        source = self._in_blocks(ask, fixed=given is not None)
        self.estimated_steps = self._steps_of(self.num_training_batches)
        return source

    def _steps_of(self, batches: int | float) -> int | float:
        """Number of updates of a fit whose epochs have so many batches."""
        epochs = self.options.epoch_limit
        return min(self.options.step_limit, self._updates(batches, epochs) if batches and epochs else 0)

    def _in_blocks(self, ask: Callable[[], Source], *, fixed: bool) -> Source:
        """A source that is asked for anew in every block of epochs; one that cannot change stays as it is.

        It is asked for as of the first epoch of its block, so that a run that continues within it gets the same.
        """

        def ask_as_of(epoch: int) -> Source:
            now, self._progress.epoch = self._progress.epoch, epoch
            try:
                return ask()
            finally:
                self._progress.epoch = now

        options = self.options
        every = 0 if fixed or options.overfit_batches else options.reload_dataloaders_every_n_epochs
        block = self._progress.epoch // every if every else 0
        source = ask_as_of(block * every) if every else ask()
        source.every, source.block, source.ask = every, block, ask_as_of
        return source

    def _updates(self, batches: int | float, epochs: int | float) -> int | float:
        """Number of updates in some epochs of `batches` each."""
        for callback in self.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                return callback.updates(batches, epochs)
        per_epoch = batches if math.isinf(batches) else math.ceil(batches / self.options.accumulate_grad_batches)
        return per_epoch * epochs

    def _val_source(self, module: Any, given: Any, datamodule: Any) -> Source | None:
        has_step = type(module).validation_step is not FitModule.validation_step
        if not has_step and given is not None:
            check_module(module, "validation_step", "fit with val_dataloaders")
        owner = datamodule if datamodule is not None else module
        if not has_step or self.options.limit_val_batches == 0 or not (given is not None or has_loader(owner, "val")):
            self.num_val_batches = []
            return None

        def ask() -> Source:
            loaders = find_loaders("val", given, None if given is not None else datamodule, module)
            return self._eval_source("val", loaders)

        return self._in_blocks(ask, fixed=given is not None)

    def _eval_source(self, kind: str, loaders: Any) -> Source:
        repeated = bool(self.options.overfit_batches) and kind == "val"
        name = "overfit_batches" if repeated else f"limit_{kind}_batches"
        source = make_source(kind, loaders, getattr(self.options, f"limit_{kind}_batches"), name, repeated=repeated)
        setattr(self, f"num_{kind}_batches", source.limits)
        return source


def as_datamodule(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """A data module may stand where loaders do, as Lightning users write it."""
    if isinstance(loaders, DataModule) and datamodule is None:
        return loaders, None
    return datamodule, loaders


def check_module(module: Any, hook: str | None, verb: str) -> None:
    """Refuses what a verb cannot run.

    Args:
        module: What the verb was given.
        hook: Name of the step hook that it needs, or `None`.
        verb: The verb, for messages.
    """
    if not isinstance(module, FitModule):
        what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise ConfigurationError(
            f"Trainer.{verb} got {what}, which is no FitModule.\n"
            "Fix: pass an instance of a class that derives from nnx_fit.FitModule and has the step hooks."
        )
    if hook is not None and getattr(type(module), hook) is getattr(FitModule, hook):
        raise ConfigurationError(
            f"{type(module).__name__} has no {hook}, which Trainer.{verb} needs.\n"
            f"Fix: define `def {hook}(self, batch)`."
        )
