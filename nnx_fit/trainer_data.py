"""`TrainerData`: the data of each verb, found, checked and counted."""

from __future__ import annotations

import math
from typing import Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from nnx_fit.data.datamodule import DataModule
from nnx_fit.data.sources import Source, find_loaders, make_source
from nnx_fit.errors import ConfigurationError
from nnx_fit.module import FitModule
from nnx_fit.options import Options


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

    def __init__(self) -> None:
        self.num_training_batches: int | float = 0
        self.num_val_batches: list[int | float] = []
        self.num_test_batches: list[int | float] = []
        self.num_predict_batches: list[int | float] = []
        self.estimated_steps: int | float = 0

    def _train_source(self, loaders: Any, module: Any) -> Source:
        if loaders is None:
            raise ConfigurationError(
                "Trainer.fit has no training data. Fix: pass train_dataloaders=, or a datamodule with "
                "train_dataloader()."
            )
        options = self.options
        name = "overfit_batches" if options.overfit_batches else "limit_train_batches"
        source = make_source(
            "train", loaders, options.limit_train_batches, name, repeated=bool(options.overfit_batches)
        )
        self.num_training_batches = source.limits[0]
        batches, epochs = self.num_training_batches, options.epoch_limit
        self.estimated_steps = min(options.step_limit, self._updates(batches, epochs) if batches and epochs else 0)
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
        loaders = find_loaders("val", given, None if given is not None else datamodule, module) if has_step else None
        if loaders is None or self.options.limit_val_batches == 0:
            self.num_val_batches = []
            return None
        return self._eval_source("val", loaders)

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
