"""`BatchSizeFinder`: the largest batch size that fits into memory, found by trial before a run begins."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.batch_size_search import SEARCH_MODES, largest_that_fits
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.finder import Finder, GivenData
from nnx_fit.callbacks.named_number import NamedNumber, find_number
from nnx_fit.callbacks.terminal import say
from nnx_fit.data.array_loader import ArrayLoader
from nnx_fit.data.loaders import loader_length
from nnx_fit.errors import ConfigurationError
from nnx_fit.trial import Trial

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class BatchSizeFinder(Finder):
    """Finds the largest batch size with which a run does not run out of memory, and uses it.

    Before `fit`, `validate`, `test` or `predict` takes its data, a few steps are tried on a copy of the module with one
    batch size after another. The run that follows is the one that would have been, had the size been given from the
    beginning: the trials leave the module, its random streams, the loaders' positions and all other callbacks alone.
    Trials call the module's hooks, on the copy, and once each the data module's loader methods, on a shallow copy. A
    run that continues keeps the size that it has, and so do `validate`, `test` and `predict` after a `fit`.

    The batch size is the number `batch_arg_name` of the module, of the data module, or of both (an attribute, an entry
    of `hparams`, or both). Where a verb is given loaders, it is that of those `ArrayLoader`s; for `fit`, of the one for
    training. It never grows beyond the length of the data.

    A size is too large when JAX says that memory is exhausted, or the host raises `MemoryError`; any other error ends
    the run. On CPU many systems promise more memory than they have, and end a program that takes it: bound the search
    there by `max_val`.

    Differences to Lightning: loaders given to `fit` are fine if they are `ArrayLoader`s; a start that does not fit is
    halved with both modes; `margin` applies only where memory was the limit; a batch size that the loaders pay no
    attention to is an error; `test` after a `fit` does not search again; the search comes before the run and cannot be
    called within it.

    Args:
        mode: `"power"` doubles the size until it is too large. `"binsearch"` then halves the interval that is left
            until the answer is exact.
        steps_per_trial: Updates of each trial, or batches when evaluating.
        init_val: The first size that is tried.
        max_trials: Largest number of sizes to try.
        batch_arg_name: Name of the batch size, or a dotted path to it.
        margin: Share by which `"binsearch"` stays below the size it found, for what trials do not see.
        max_val: Largest size to try; `None` for no limit.

    Attributes:
        optimal_batch_size: The size that was found, or `None`.

    Raises:
        ConfigurationError: An argument is invalid; there is no batch size to set, or setting it changes nothing; or
            nothing fits.

    Example:
        >>> import nnx_fit as nf
        >>> from nnx_fit.callbacks.batch_size_finder import BatchSizeFinder
        >>> trainer = nf.Trainer(max_epochs=5, callbacks=BatchSizeFinder(mode="binsearch", max_val=1024), logger=False)
    """

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int | None = 8192,
    ):
        if mode not in SEARCH_MODES:
            raise ConfigurationError(f'BatchSizeFinder(mode={mode!r}): expected "power" or "binsearch".')
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
            raise ConfigurationError(f"BatchSizeFinder(margin={margin!r}): expected a share, from 0.0 to below 1.0.")
        self.mode = mode
        self.steps_per_trial = whole_number("BatchSizeFinder", "steps_per_trial", steps_per_trial, least=1)
        self.init_val = whole_number("BatchSizeFinder", "init_val", init_val, least=1)
        self.max_trials = whole_number("BatchSizeFinder", "max_trials", max_trials, least=1)
        self.batch_arg_name = batch_arg_name
        self.margin = float(margin)
        self.max_val = max_val if max_val is None else whole_number("BatchSizeFinder", "max_val", max_val, least=1)
        self.optimal_batch_size: int | None = None
        self._of_fit = False

    def find(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Searches, and sets the size that was found; evaluation after a fit keeps that of the fit."""
        if data.verb != "fit" and self._of_fit:
            return
        if jax.process_count() > 1:
            raise ConfigurationError(
                "BatchSizeFinder: where one of several processes runs out of memory, the others would wait for it.\n"
                "Fix: search with one process, and give the size that was found."
            )
        sizes = self._sizes(module, data)
        before = [size.value for size in sizes]
        trials = _Trials(trainer, module, data, sizes, self.steps_per_trial, self.max_val)
        try:
            found = largest_that_fits(
                trials.fits,
                self.init_val,
                mode=self.mode,  # type: ignore[arg-type]
                max_trials=self.max_trials,
                limit=lambda: trials.limit,
            )
        finally:
            for size, value in zip(sizes, before, strict=True):
                size.set(value)
        kept = int(min(found.size, trials.limit))
        if self.mode == "binsearch" and found.too_large is not None:
            kept = max(1, math.floor(kept * (1 - self.margin)))
        self.optimal_batch_size, self._of_fit = kept, data.verb == "fit"
        self.adopt(trainer, module, data)
        because = trials.bound if found.too_large is None else f"{found.too_large} is too large"
        say(f"BatchSizeFinder: {sizes[0].label} = {kept} ({because}).")

    def adopt(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Sets the size that was found, now or in the run that this one continues."""
        if self.optimal_batch_size is not None:
            for size in self._sizes(module, data):
                size.set(self.optimal_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The size that was found."""
        return {"optimal_batch_size": self.optimal_batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.optimal_batch_size, self._of_fit = state["optimal_batch_size"], True

    def _sizes(self, module: FitModule, data: GivenData) -> list[NamedNumber]:
        """The numbers that are the batch size."""
        if data.loaders is not None:
            loaders = jax.tree.leaves(data.loaders, is_leaf=lambda item: isinstance(item, ArrayLoader))
            if all(isinstance(loader, ArrayLoader) for loader in loaders):
                return [NamedNumber("loader.batch_size", loader, "batch_size") for loader in loaders]
            raise ConfigurationError(
                f"BatchSizeFinder: the batch size of a {type(data.loaders).__name__} cannot be changed.\n"
                "Fix: pass an ArrayLoader, or a DataModule that makes its loaders with batch_size=self.batch_size."
            )
        name = self.batch_arg_name
        owners = {"module": module, "datamodule": data.datamodule}
        found = [number for label, owner in owners.items() if (number := find_number(owner, label, name)) is not None]
        if found:
            return found
        raise ConfigurationError(
            f"BatchSizeFinder: neither {type(module).__name__} nor its data module has a number named {name!r}.\n"
            f"Fix: set `self.{name}` in __init__ and make the loaders with it, or name the attribute: "
            "BatchSizeFinder(batch_arg_name=...)."
        )


class _Trials:
    """Tries batch sizes.

    Args:
        trainer: The Trainer of the run.
        module: Its module.
        data: What it was given to run on.
        sizes: The numbers that are the batch size.
        steps: Updates, or batches when evaluating, of a trial.
        max_val: Largest size to try, or `None`.

    Attributes:
        limit: Largest size that makes sense.
        bound: Why, for the user.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: FitModule,
        data: GivenData,
        sizes: Sequence[NamedNumber],
        steps: int,
        max_val: int | None,
    ):
        self.limit: int | float = math.inf if max_val is None else max_val
        self.bound = "max_trials is reached" if max_val is None else "max_val or max_trials is reached"
        self._trainer = trainer
        self._module = module
        self._data = data
        self._sizes = sizes
        self._arguments = _arguments(trainer, data.verb, steps)
        self._last: tuple[int, int] | None = None  # a size and the rows that its batches had

    def fits(self, size: int) -> bool:
        """Whether a few steps with batches of a size do not run out of memory."""
        for number in self._sizes:
            number.set(size)
        watch = _Watch(self._data.verb)
        trial = Trial(self._trainer, self._data, [watch], **self._arguments)
        try:
            trial.run(self._module)
        except Exception as error:
            if not out_of_memory(error):
                raise
            fitted = False
        else:
            fitted = True
            self._learn(size, watch.rows, trial.loaders[:1] if self._data.verb == "fit" else trial.loaders)
        del trial, watch
        gc.collect()  # a run and its Trainer know each other, and both hold arrays
        return fitted

    def _learn(self, size: int, rows: int, loaders: Sequence[Any]) -> None:
        """Takes note of how long the data is, and of whether its batches are as large as they should be."""
        known = [length for loader in loaders if (length := _rows(loader)) is not None]
        whole = all(loader_length(loader) == 1 for loader in loaders)
        length = max(known) if len(known) == len(loaders) else rows if whole else math.inf
        if length <= self.limit:
            self.limit, self.bound = length, "the data is no longer"
        if not whole and self._last is not None and self._last[0] != size and self._last[1] == rows:
            raise ConfigurationError(
                f"BatchSizeFinder: the batches have {rows} rows with {self._sizes[0].label} = {self._last[0]} and with "
                f"{size}, so that it has no effect.\n"
                f"Fix: let the loader be made with that batch size each time it is asked for, not before."
            )
        self._last = (size, rows)


class _Watch(Callback):
    """Sees how many rows batches have, and waits for each step, so that one that fails is told from later ones."""

    reads_module = False
    logs = False

    def __init__(self, verb: str):
        self.rows = 0
        stage = {"fit": "train", "validate": "validation"}.get(verb, verb)
        # Hooks of one stage only: validation batches of a fit have a size of their own.
        setattr(self, f"on_{stage}_batch_start", self._note)
        setattr(self, f"on_{stage}_batch_end", self._wait)

    def _note(self, trainer: Trainer, module: FitModule, batch: Any, *place: int) -> None:
        self.rows = max([self.rows, *(np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf))])

    def _wait(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, *place: int) -> None:
        jax.block_until_ready(outputs)


def _arguments(trainer: Trainer, verb: str, steps: int) -> dict[str, Any]:
    """Arguments of the Trainer of a trial."""
    if verb != "fit":
        return {"max_epochs": 1, f"limit_{'val' if verb == 'validate' else verb}_batches": steps}
    return {
        "max_steps": steps,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "limit_val_batches": steps if trainer.options.limit_val_batches else 0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
    }


def _rows(loader: Any) -> int | None:
    """Number of rows of a loader's data, where it can be told."""
    if isinstance(loader, ArrayLoader):
        return loader.num_rows
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised for, says that memory ran out on the device or on the host."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        # What a later step makes of a failed one's results has other words in front of it.
        message = str(error).lower() if isinstance(error, jax.errors.JaxRuntimeError) else ""
        if "resource_exhausted" in message or "out of memory" in message:
            return True
        error = error.__cause__ or error.__context__
    return False
