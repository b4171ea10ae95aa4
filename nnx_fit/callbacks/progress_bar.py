"""`RichProgressBar`: how far a run is, in bars on a terminal and in plain lines elsewhere.

It shows what is already known on the host: it never waits for the device, and costs a look at the clock per batch.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from nnx_fit.callbacks.arguments import seconds, whole_number
from nnx_fit.callbacks.callback import Callback, Phase, pausing
from nnx_fit.callbacks.progress_display import Display, make_display

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class RichProgressBar(Callback):
    """Shows epoch, batches, speed, time and the metrics logged with `prog_bar=True`.

    On a terminal bars are redrawn at most ten times a second. Elsewhere one line is written for each epoch.

    Args:
        refresh_rate: Batches between two updates at least; 0 shows nothing.
        leave: Leave the bar of each finished epoch on the terminal.
        log_interval: Seconds between two plain lines while an epoch is under way, where there is no terminal.
    """

    # After EarlyStopping and the like have looked at the epoch's metrics, so that they have arrived.
    phase: ClassVar[Phase] = "decide"
    reads_module = False
    logs = False

    def __init__(self, refresh_rate: int = 1, *, leave: bool = False, log_interval: float = 30.0):
        self.refresh_rate = whole_number("RichProgressBar", "refresh_rate", refresh_rate)
        self.leave = leave
        self.log_interval = seconds("RichProgressBar", "log_interval", log_interval) or 30.0
        self._display: Display | None = None
        self._stages: list[str] = []
        self._next = float("inf")
        self._completed = 0
        self._batches = 0

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins the bar of an epoch."""
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        self._batches = 0
        self._begin("train", f"Epoch {trainer.current_epoch}{last}", trainer.num_training_batches)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the bar now and then."""
        self._batches = batch_idx + 1
        if time.monotonic() >= self._next and self._batches % self.refresh_rate == 0:
            self._update("train", self._batches, trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the bar of an epoch."""
        self._end("train", self._batches, trainer)

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins a bar."""
        sanity = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
        self._begin_eval("validate", "Sanity check" if sanity else "Validation", batches)

    def on_validation_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Moves the bar now and then."""
        self._count("validate", trainer)

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the bar."""
        self._end("validate", self._completed, trainer)

    def on_test_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins a bar."""
        self._begin_eval("test", "Test", trainer.num_test_batches)

    def on_test_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Moves the bar now and then."""
        self._count("test", trainer)

    def on_test_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the bar."""
        self._end("test", self._completed, trainer)

    def on_predict_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins a bar."""
        self._begin_eval("predict", "Prediction", trainer.num_predict_batches)

    def on_predict_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Moves the bar now and then."""
        self._count("predict", trainer)

    def on_predict_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the bar."""
        self._end("predict", self._completed, trainer)

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Gives the terminal back before the error is shown."""
        self._close()

    def teardown(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Gives the terminal back."""
        self._close()

    def _begin(self, stage: str, label: str, total: float) -> None:
        if not self.refresh_rate:
            return
        if self._display is None:
            self._display = make_display(interval=self.log_interval, leave=self.leave)
        self._stages.append(stage)
        self._display.begin(stage, label, total)
        self._next = 0.0

    def _begin_eval(self, stage: str, label: str, batches: list[int | float]) -> None:
        self._completed = 0
        self._begin(stage, label, sum(batches))

    def _count(self, stage: str, trainer: Trainer) -> None:
        self._completed += 1
        if time.monotonic() >= self._next and self._completed % self.refresh_rate == 0:
            self._update(stage, self._completed, trainer)

    def _update(self, stage: str, completed: int, trainer: Trainer) -> None:
        if self._display is not None and stage in self._stages:
            pause = self._display.update(stage, completed, trainer.progress_bar_metrics)
            self._next = time.monotonic() + pause

    def _end(self, stage: str, completed: int, trainer: Trainer) -> None:
        if self._display is not None and stage in self._stages:
            self._display.end(stage, completed, trainer.progress_bar_metrics)
            self._stages.remove(stage)
            self._next = 0.0

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None
            self._stages = []
            self._next = float("inf")
