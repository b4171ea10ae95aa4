"""`ProfilerCallback`: a trace of a few updates, for TensorBoard's profile tab."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.tensorboard import TensorBoardLogger

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class ProfilerCallback(Callback):
    """Records what host and device do during a window of updates, with `jax.profiler`.

    The trace holds the updates `start_step + 1` to `start_step + num_steps`, each marked as a step, and whatever
    happens between them: loading, callbacks, a validation. The run waits for the device at both ends of the window and
    nowhere else. The trace is complete on disk when the window ends, or when an error, a signal or the end of the
    training cuts it short. A run that continues within the window records what is left of it, after it nothing.

    TensorBoard shows it in its profile tab when `tensorboard-plugin-profile` (or `xprof`) is installed.

    Args:
        start_step: Number of updates before the window. The default leaves out the steps that compile.
        num_steps: Number of updates in the window. A trace grows quickly: a few are enough.
        dirpath: Directory of the trace, which is in `plugins/profile/<time>` below it. Default: that of the first
            `TensorBoardLogger`, without one the Trainer's `log_dir`.

    Raises:
        ConfigurationError: An argument is out of range, or another trace is under way when the window begins.

    Example:
        >>> import nnx_fit as nf
        >>> from nnx_fit.callbacks.profiler import ProfilerCallback
        >>> profiler = ProfilerCallback(start_step=20, num_steps=3)
        >>> trainer = nf.Trainer(max_epochs=1, callbacks=profiler, logger=False)
        >>> profiler.directory(trainer) == trainer.log_dir
        True
    """

    reads_module = False
    logs = False

    def __init__(self, start_step: int = 10, num_steps: int = 5, dirpath: str | Path | None = None):
        self.start_step = whole_number("ProfilerCallback", "start_step", start_step)
        self.num_steps = whole_number("ProfilerCallback", "num_steps", num_steps, least=1)
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self._running = False
        self._mark: jax.profiler.StepTraceAnnotation | None = None
        self._marked = -1
        self._began = 0

    @property
    def stop_step(self) -> int:
        """Number of updates after which the window ends."""
        return self.start_step + self.num_steps

    def directory(self, trainer: Trainer) -> Path:
        """The directory below which the trace is."""
        if self.dirpath is not None:
            return self.dirpath
        boards = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return Path(next((path for path in boards if path is not None), trainer.log_dir))

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins the window, if the run starts inside of it."""
        self._follow(trainer)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begins or ends the window, or marks the next step in it."""
        self._follow(trainer)

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends a window that is longer than the training."""
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Ends the window."""
        self._stop(trainer)

    def teardown(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Ends the window if nothing else did."""
        self._stop(trainer)

    def _follow(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step >= self.stop_step:
            self._stop(trainer)
            self.paused_until = sys.maxsize
            return
        if step >= self.start_step:
            if not self._running:
                self._start(trainer)
            if self._marked != step:
                self._mark_step(step)
        self.paused_until = max(self.start_step, step + 1)

    def _start(self, trainer: Trainer) -> None:
        _wait_for_device(trainer)
        try:
            jax.profiler.start_trace(self.directory(trainer))
        except RuntimeError as error:
            raise ConfigurationError(
                f"ProfilerCallback(start_step={self.start_step}): the trace cannot begin ({error}).\n"
                "Fix: let one of them end before the other begins; a process has one profiler."
            ) from error
        self._running, self._began = True, trainer.global_step

    def _mark_step(self, step: int) -> None:
        self._unmark()
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
        self._mark.__enter__()
        self._marked = step

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        self._marked = -1
        if mark is not None:
            mark.__exit__(None, None, None)

    def _stop(self, trainer: Trainer) -> None:
        if not self._running:
            return
        self._running = False
        try:
            _wait_for_device(trainer)
        finally:
            self._unmark()
            jax.profiler.stop_trace()
        steps = trainer.global_step - self._began
        say(f"ProfilerCallback: {steps} updates from step {self._began + 1} on are in {self.directory(trainer)}.")


def _wait_for_device(trainer: Trainer) -> None:
    """Waits for all updates that were dispatched: the last one's arrays are ready when it is done."""
    jax.block_until_ready([x for x in trainer.peek(...).values() if not x.is_deleted()])
