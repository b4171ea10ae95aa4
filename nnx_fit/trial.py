"""`Trial`: a short run of a copy of a module, whose only traces are what its callbacks keep.

What a callback searches with, before the real run has taken its data and its optimizer.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from nnx_fit import verbs
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.finder import GivenData
from nnx_fit.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from nnx_fit.data.sources import Repeated, Source
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Logger
from nnx_fit.module import FitModule
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.run import Run
from nnx_fit.trainer import Trainer

# What a trial has otherwise than the run it is made for.
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "detect_nonfinite": False,
    "deterministic": False,  # already asked for, once and for all
    "reload_dataloaders_every_n_epochs": 0,
}

# Gives a trial's optimizers, from the run and the function that gives those of the real run.
ChooseOptimizers = Callable[[Run, Callable[[], tuple[BoundOptimizer, ...]]], tuple[BoundOptimizer, ...]]


class SilentLogger(Logger):
    """Stands for the real run's loggers: takes whatever a module's hooks hand to a logger, and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    @property
    def experiment(self) -> Any:
        """Takes whatever a module does with it."""
        return _Nothing()


class _Nothing:
    """Has every attribute, can be called with anything, and is itself what comes of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


class Trial(Trainer):
    """A Trainer like another one, for one short run of a copy of its module.

    The module and the data module are set up already, and are not torn down. The module's hooks run, on the copy;
    of the other Trainer's callbacks only a `GradientAccumulationScheduler` takes part.

    Args:
        trainer: The Trainer of the real run.
        data: What the real run is given.
        callbacks: What watches the trial.
        choose_optimizers: Gives the trial's optimizers; by default they are the real run's.
        **arguments: Arguments of `Trainer` that differ.

    Attributes:
        loaders: The loaders of the trial.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: GivenData,
        callbacks: Sequence[Callback],
        *,
        choose_optimizers: ChooseOptimizers | None = None,
        **arguments: Any,
    ):
        schedulers = [copy.copy(each) for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
        super().__init__(
            **{**trainer._arguments, **QUIET, **arguments},
            optimizer=trainer._optimizer,
            callbacks=[*schedulers, *callbacks],
            logger=[SilentLogger() for _ in trainer.loggers] or False,
            default_root_dir=trainer.default_root_dir,
        )
        self.loaders: list[Any] = []
        self._real = trainer
        self._data = data
        self._choice = choose_optimizers
        self._keeping = ExitStack()

    def run(self, module: FitModule) -> None:
        """Runs the verb.

        Args:
            module: The module, of which a copy runs.
        """
        data = self._data
        datamodule = copy.copy(data.datamodule)  # what its loader methods keep in it stays in the copy
        with _random_state_kept(), self._keeping:
            self._keep_positions([data.loaders, data.val_loaders])
            if data.verb == "fit":
                self.fit(twin(module), data.loaders, data.val_loaders, datamodule=datamodule)
            else:
                getattr(self, data.verb)(twin(module), data.loaders, datamodule=datamodule)

    def _start(self, verb: str, module: FitModule, datamodule: Any) -> Run:
        run = super()._start(verb, module, datamodule)
        run.funnel.silence("setup", "teardown")
        return run

    @contextmanager
    def _session(self, run: Run) -> Iterator[None]:
        with verbs.session(run, None, self._fan_out, self._note_interrupt, self.wait_for_checkpoints):
            yield

    def _train_source(self, given: Any, datamodule: Any, module: Any) -> Source:
        source = super()._train_source(given, datamodule, module)
        self._take_note(source)
        # Schedules are as long as in the real run.
        self.estimated_steps = self._real._steps_of(self.num_training_batches)
        return source

    def _eval_source(self, kind: str, loaders: Any) -> Source:
        source = super()._eval_source(kind, loaders)
        self._take_note(source)
        return source

    def _choose_optimizers(self, run: Run) -> tuple[BoundOptimizer, ...]:
        choose = super()._choose_optimizers
        return choose(run) if self._choice is None else self._choice(run, lambda: choose(run))

    def _take_note(self, source: Source) -> None:
        found = [loader._loader if isinstance(loader, Repeated) else loader for loader in source.loaders]
        self.loaders += found
        self._keep_positions(found)

    def _keep_positions(self, loaders: Any) -> None:
        """Sees to it that loaders which know their position are brought back to it after the trial."""
        for loader in jax.tree.leaves(loaders, is_leaf=_is_iterable_object):
            if all(callable(getattr(loader, name, None)) for name in ("get_state", "set_state")):
                self._keeping.callback(loader.set_state, copy.deepcopy(loader.get_state()))
            elif hasattr(type(loader), "__next__"):
                raise ConfigurationError(
                    f"A search reads the data before the run does, and a {type(loader).__name__} is an iterator, which "
                    "cannot be taken back to its beginning.\n"
                    "Fix: pass an object whose `__iter__` starts again, a function that returns the iterator, or give "
                    "it get_state() and set_state(state)."
                )


def _is_iterable_object(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, list | tuple | dict)


def twin(module: FitModule) -> FitModule:
    """A copy of a module that shares nothing with it.

    Raises:
        ConfigurationError: Something that the module holds cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (TypeError, copy.Error) as error:
        raise ConfigurationError(
            f"A search trains a copy of {type(module).__name__}, which cannot be copied: {error}.\n"
            "Fix: keep what cannot be copied (a lock, an open file, a connection) outside of the module."
        ) from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leaves the global random generators, from which loaders may draw, as they were."""
    python, numpy, torch = random.getstate(), np.random.get_state(), sys.modules.get("torch")
    drawn = torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(drawn)
