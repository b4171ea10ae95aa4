"""`ThroughputMonitor`: how fast training is, and what it waits for.

The clock is read twice per batch. What lies between an evaluation's or a checkpoint's beginning and the next batch is
taken out, but for the time spent in the loader.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.log_points import LogPoints
from nnx_fit.data.batches import batch_size
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class _Totals(NamedTuple):
    """Of training so far: seconds, those of them in the loader, and what was done in them."""

    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    batches: int = 0
    samples: float = 0.0


class ThroughputMonitor(Callback):
    """Logs the speed of training with every record of step metrics, over the latest batches.

    - `throughput/steps_per_second`, `throughput/batches_per_second` and `throughput/samples_per_second`; a step is an
      update, which takes several batches under accumulation.
    - `throughput/data_wait`: the share of the time, from 0 to 1, that the host spent in the loader. A device may have
      been busy meanwhile with the steps dispatched before.
    - `throughput/compile_seconds` and `throughput/compilations`: time spent so far in steps whose program was compiled
      in them, and how often that was. These steps count in none of the rates.

    The time of validations and of saving checkpoints is no part of any of these. (What an asynchronous save does in the
    background is not waited for, and so not taken out.) Nothing waits for the device but the beginning of a validation,
    so that what it still has to do of training is counted as such.

    Args:
        window: Number of batches that the rates are taken over: the latest so many.
        batch_size_fn: Gives the number of samples in a batch; it had better look at shapes only. Default: the leading
            axis; batches without a common one have no `samples_per_second`.
        clock: Seconds, monotonic; the one that the time in loaders is taken with.

    Raises:
        ConfigurationError: The window is no whole number of at least 1, or `batch_size_fn` is no function.

    Example:
        >>> from nnx_fit.callbacks.throughput_monitor import ThroughputMonitor
        >>> ThroughputMonitor(window=20, batch_size_fn=lambda batch: batch["tokens"].size).window
        20
    """

    reads_module = False

    def __init__(
        self,
        window: int = 100,
        batch_size_fn: Callable[[Any], float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if batch_size_fn is not None and not callable(batch_size_fn):
            raise ConfigurationError(
                f"ThroughputMonitor(batch_size_fn={batch_size_fn!r}): that is no function.\n"
                'Fix: pass one of a batch, such as lambda batch: len(batch["x"]), or None for the leading axis.'
            )
        self.window = whole_number("ThroughputMonitor", "window", window, least=1)
        self.batch_size_fn = batch_size_fn
        self._clock = clock
        self._points = LogPoints()
        self._training = False

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Starts over."""
        self._training = False

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts the clock."""
        self._points.start(trainer)
        self.paused_until = 0 if trainer.log_every_n_steps else sys.maxsize
        self._training = bool(trainer.log_every_n_steps)
        self._history = deque([_Totals()], maxlen=self.window + 1)
        self._compile_seconds = 0.0
        self._compilations = 0
        self._compiled: list[str] = list(trainer.compilations)
        self._sized = True
        self._away = False  # whether something other than training has begun since the mark
        self._seconds = self._waited = 0.0  # since the last batch
        self._step = trainer.global_step
        self._pass: Any = None
        self._pass_waited = 0.0
        self._mark = self._clock()

    def on_train_batch_start(self, trainer: Trainer, module: FitModule, batch: Any, batch_idx: int) -> None:
        """Counts the time in which the batch was got."""
        if self._training:
            self._count(trainer)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the batch, and logs where a record is due."""
        if not self._training:
            return
        self._count(trainer)
        compiled = trainer.compilations
        if compiled != self._compiled:
            self._compiled = compiled
            self._compilations += 1
            self._compile_seconds += self._seconds - self._waited
        else:
            done = self._history[-1]
            self._history.append(
                _Totals(
                    done.seconds + self._seconds,
                    done.waited + self._waited,
                    done.steps + trainer.global_step - self._step,
                    done.batches + 1,
                    done.samples + self._samples(batch),
                )
            )
        self._seconds = self._waited = 0.0
        self._step = trainer.global_step
        if self._points.reached(trainer):
            for name, value in self._rates():
                module.log(f"throughput/{name}", value)

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Leaves the time of the validation out."""
        if self._training:
            _ = trainer.callback_metrics  # waits for the steps that the device still works on
            self._leave(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: FitModule, checkpoint: dict[str, Any]) -> None:
        """Leaves the time of writing the checkpoint out."""
        if self._training:
            self._leave(trainer)

    def _count(self, trainer: Trainer) -> None:
        """Takes the time since the mark, or if something else began in it only what the loader took."""
        now = self._clock()
        waited = self._waited_since(trainer)
        self._seconds += waited if self._away else now - self._mark
        self._waited += waited
        self._mark, self._away = now, False

    def _leave(self, trainer: Trainer) -> None:
        if not self._away:
            self._count(trainer)
            self._away = True

    def _waited_since(self, trainer: Trainer) -> float:
        """Seconds in the loader since this was last asked; each pass over the data counts its own."""
        current = _training_pass(trainer)
        if current is not self._pass:
            self._pass, self._pass_waited = current, 0.0
        if current is None:
            return 0.0
        before, self._pass_waited = self._pass_waited, current.wait_seconds
        return self._pass_waited - before

    def _samples(self, batch: Any) -> float:
        if self.batch_size_fn is not None:
            return float(self.batch_size_fn(batch))
        if self._sized:
            try:
                return batch_size(batch)
            except ConfigurationError:
                self._sized = False
        return 0.0

    def _rates(self) -> Iterator[tuple[str, float]]:
        first, last = self._history[0], self._history[-1]
        seconds = last.seconds - first.seconds
        if seconds > 0:
            yield "steps_per_second", (last.steps - first.steps) / seconds
            yield "batches_per_second", (last.batches - first.batches) / seconds
            if self._sized:
                yield "samples_per_second", (last.samples - first.samples) / seconds
            yield "data_wait", (last.waited - first.waited) / seconds
        yield "compile_seconds", self._compile_seconds
        yield "compilations", float(self._compilations)


def _training_pass(trainer: Trainer) -> Any:
    """The pass over the training data that is under way, a `Prefetcher`, or `None`."""
    return trainer._run.batches if trainer._run is not None else None
