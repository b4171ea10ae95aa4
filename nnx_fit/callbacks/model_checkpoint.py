"""`ModelCheckpoint`: when a run is saved. Which of its checkpoints stay on disk is the shelf's to say.

What a checkpoint holds and how it is written is not decided here. Everything is saved before anything is deleted, so
that a run killed at any moment leaves a complete checkpoint.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nnx_fit.callbacks import checkpoint_names as names
from nnx_fit.callbacks.arguments import seconds, whole_number
from nnx_fit.callbacks.callback import Callback, Phase, pausing
from nnx_fit.callbacks.checkpoint_attempts import Attempts
from nnx_fit.callbacks.checkpoint_shelf import CheckpointShelf
from nnx_fit.callbacks.monitor import Mode, check_mode, missing_metric, monitored_value, validates_once_per_epoch
from nnx_fit.callbacks.terminal import say
from nnx_fit.callbacks.top_k import TopK
from nnx_fit.checkpoint.directories import check_writable
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class ModelCheckpoint(Callback):
    """Saves checkpoints: the best by a metric, or the newest, and the state the run ended in.

    Without any of the three intervals, it saves after every epoch; with a `monitor` that validation logs, after the
    validation. A state that is not among the best is kept as `last` until there is a newer checkpoint.

    Differences to Lightning's: `last` is always the state the run ended in, and on by default. Without a monitor every
    epoch is saved, however often there is a validation. A save that is due by steps waits for the validation that
    measures the monitored metric, where Lightning takes the value of the one before. A metric's `/` is `_` in a file
    name and makes no directory; one that was not logged is `nan` there, not 0. What a run continues from is never
    deleted. A save that fails is reported once, what it would have displaced stays, and training goes on; only one that
    fails at the end of the run is an error.

    Args:
        dirpath: Directory of the checkpoints. Default: `checkpoints` in the Trainer's `log_dir`.
        filename: Template of their names; fields are `epoch` (from 0), `step` (`global_step`) and metrics. Default:
            `"{epoch}-{step}"`, giving `epoch=2-step=15`.
        monitor: Name of the metric that decides which are best; `None`: the newest is.
        mode: `"min"`: smaller is better; `"max"`: larger is better.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none.
        save_last: Keep an entry whose name starts with `last`: the state the run ended in. `None` means `True`.
        every_n_train_steps: Save every so many updates; a monitored validation metric is waited for.
        every_n_epochs: Save every so many epochs; 0 for never.
        train_time_interval: Save after this much time: a `timedelta`, a dict of its arguments, or seconds.
        save_on_exception: Save `last` when an error or a signal ends the run.
        save_weights_only: Leave out what only training needs.
        async_save: Write in the background while training goes on.
        save_on_train_epoch_end: Save after training epochs (`True`) or after validations (`False`), where
            `every_n_epochs` says so. `None`: as said above.
        auto_insert_metric_name: Write fields of the template as `name=value`; `False`: as the value alone.
        enable_version_counter: A name that is taken gets `-v1`, `-v2`, ...; `False`: the new one replaces what has it.
        verbose: Report every checkpoint.

    Raises:
        ConfigurationError: An argument is invalid or contradicts another one.

    Example:
        >>> import nnx_fit as nf
        >>> checkpoint = nf.ModelCheckpoint(monitor="val/loss", filename="{epoch}-{val/loss:.2f}", save_top_k=3)
        >>> checkpoint.best_model_path
        ''
    """

    phase: ClassVar[Phase] = "save"
    reads_module = False
    logs = False

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: datetime.timedelta | Mapping[str, float] | float | None = None,
        save_on_exception: bool = True,
        save_weights_only: bool = False,
        async_save: bool = True,
        *,
        save_on_train_epoch_end: bool | None = None,
        auto_insert_metric_name: bool = True,
        enable_version_counter: bool = True,
        verbose: bool = False,
    ):
        owner = "ModelCheckpoint"
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self._follows_trainer = dirpath is None
        self.filename = names.DEFAULT if filename is None else filename
        names.check_template(self.filename)
        self.monitor = monitor
        self.mode: Mode = check_mode(owner, mode)
        self.save_top_k = whole_number(owner, "save_top_k", save_top_k, least=-1)
        if monitor is None and save_top_k > 1:
            raise ConfigurationError(
                f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None): without a metric no {save_top_k} checkpoints "
                "are the best. Fix: pass monitor=..., or save_top_k=1 (the newest), -1 (all) or 0 (only the last)."
            )
        self.save_last = save_last is None or save_last
        self.every_n_train_steps = whole_number(owner, "every_n_train_steps", every_n_train_steps or 0)
        self.train_time_interval = seconds(owner, "train_time_interval", train_time_interval)
        default = 0 if self.every_n_train_steps or self.train_time_interval else 1
        self.every_n_epochs = whole_number(
            owner, "every_n_epochs", default if every_n_epochs is None else every_n_epochs
        )
        if sum(map(bool, (self.every_n_train_steps, self.every_n_epochs, self.train_time_interval))) > 1:
            raise ConfigurationError(
                f"ModelCheckpoint(every_n_train_steps={every_n_train_steps}, every_n_epochs={every_n_epochs}, "
                f"train_time_interval={train_time_interval}): only one of them can say when to save. Fix: pass one; "
                "a second ModelCheckpoint may have another."
            )
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.async_save = async_save
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.auto_insert_metric_name = auto_insert_metric_name
        self.enable_version_counter = enable_version_counter
        self.verbose = verbose
        self._shelf: CheckpointShelf | None = None
        self._validation_metric: bool | None = None
        self._validated = False
        self._deferred = False
        self._start: int | None = None
        self._saved_step = -1
        self._ended = -1
        self._next_time = float("inf")
        self._attempts = Attempts()

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint, of the newest without a monitor; `""` before the first."""
        return self._shelf.best[0] if self._shelf is not None else ""

    @property
    def best_model_score(self) -> float | None:
        """The best checkpoint's value of the monitored metric; `None` without one."""
        return self._shelf.best[1] if self._shelf is not None else None

    @property
    def last_model_path(self) -> str:
        """Path of the `last` checkpoint; `""` while there is none."""
        return str(self._shelf.last or "") if self._shelf is not None else ""

    def directory(self, trainer: Trainer) -> Path:
        """The directory of the checkpoints: `dirpath`, or its default under this Trainer."""
        if self.dirpath is None or self._follows_trainer:
            return Path(trainer.log_dir) / "checkpoints"
        return self.dirpath

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Finds the directory, and refuses one that cannot be written to."""
        if self._shelf is None or stage == "fit":
            # Each fit has its own: the best of another one, perhaps of another module, is not the best of this one.
            self.dirpath = self.directory(trainer)
            self._shelf = CheckpointShelf(
                self.dirpath,
                self.filename,
                TopK(self.save_top_k, self.mode),
                insert_names=self.auto_insert_metric_name,
                versions=self.enable_version_counter,
            )
        if stage == "fit":
            check_writable(self._shelf.directory)
            self._validation_metric = None
            self._start = None
            self._saved_step = self._ended = -1
            self._attempts = Attempts()
            self._validated = self._deferred = False

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Notes where the run starts, and starts the clock."""
        self._ready.origin = None if trainer.resumed_from is None else Path(trainer.resumed_from)
        self._start = trainer.total_batches
        self._next_time = time.monotonic() + (self.train_time_interval or float("inf"))
        self._pause(trainer.global_step)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves where an interval of updates or of time ends."""
        if self._ready.waiting:
            self._ready.tidy()
        self._save_if_due(trainer)
        self._pause(trainer.global_step)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self.every_n_train_steps:
            if trainer.global_step % self.every_n_train_steps:
                return
        elif time.monotonic() < self._next_time:
            return
        else:
            self._next_time = time.monotonic() + (self.train_time_interval or float("inf"))
        self._deferred = self._waits_for_validation(trainer)
        if not self._deferred:
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Notes whether the monitored metric is there without validation."""
        if trainer.fitting and not trainer.sanity_checking and self._validation_metric is None:
            self._waits_for_validation(trainer)

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Saves what waited for the validation."""
        if not trainer.fitting or trainer.sanity_checking:
            return
        if self.monitor is not None:
            self._validated = True
            if self._validation_metric is None and self.monitor in trainer.callback_metrics:
                self._validation_metric = True
        deferred = self._deferred and bool(self._validation_metric)
        if deferred or (self._epoch_due(trainer) and self._saves_after_validations(trainer)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Saves after an epoch, unless the monitored metric makes that happen after validations."""
        self._ready.tidy()
        waits = self._waits_for_validation(trainer)
        if self.monitor is not None and self._validation_metric is None and (self._validated or not waits):
            metrics = trainer.callback_metrics
            if self.monitor not in metrics:
                raise missing_metric("ModelCheckpoint", self.monitor, list(metrics))
        if self.save_on_train_epoch_end is None:
            here = validates_once_per_epoch(trainer) or not waits
        else:
            here = self._known(trainer) and (self.save_on_train_epoch_end or not trainer.validation_enabled)
        if here and self._epoch_due(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Saves the state the run ended in."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Saves the state in which the run was cut off."""
        if self.save_on_exception and trainer.fitting:
            self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints it keeps with their scores, what it knows about the metric, and what waits for it."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "validation_metric": self._validation_metric,
            "deferred": self._deferred,
            "saved_step": self._saved_step,
            "shelf": self._ready.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave. Scores by another metric mean nothing here and are left out."""
        self._saved_step = state.get("saved_step", -1)
        if (state["monitor"], state["mode"]) == (self.monitor, self.mode):
            self._validation_metric = state["validation_metric"]
            self._deferred = state.get("deferred", False)
            self._ready.load_state_dict(state["shelf"])

    def _save(self, trainer: Trainer) -> None:
        """Saves the state after the current update, under a name of its own or as `last`."""
        step, self._deferred = trainer.global_step, False
        if step == self._saved_step:
            return
        self._saved_step = step
        self._attempts.settle(trainer, self._ready)
        score = None if self.monitor is None else monitored_value("ModelCheckpoint", self.monitor, trainer)
        values = dict(trainer.callback_metrics) if names.metric_fields(self.filename) else {}
        path = self._ready.place(score, values | {"epoch": trainer.current_epoch, "step": step})
        if self.verbose:
            what = f"saves {path.name}" if path is not None else f"step {step} is not among the best {self.save_top_k}"
            say(f"ModelCheckpoint: {what}{f', {self.monitor} = {score:.6g}' if score is not None else ''}")
        if path is not None:
            self._write(trainer, path, asynchronous=self.async_save)
        elif self.save_last:
            self._write_last(trainer, asynchronous=self.async_save)

    def _end(self, trainer: Trainer) -> None:
        batches = trainer.total_batches
        trained = self._start is not None and batches > self._start
        if trained and self.save_last and self._ended != batches:
            self._ended = batches
            self._write_last(trainer, asynchronous=False, gives_up=True)
        if self._shelf is not None:
            self._attempts.settle(trainer, self._shelf)
            self._shelf.tidy()

    def _write_last(self, trainer: Trainer, *, asynchronous: bool, gives_up: bool = False) -> None:
        self._attempts.settle(trainer, self._ready)
        self._ready.tidy()  # an older `last` may be about to go, and its name to become free
        self._write(trainer, self._ready.place_last(), asynchronous=asynchronous, gives_up=gives_up)

    def _write(self, trainer: Trainer, path: Path, *, asynchronous: bool, gives_up: bool = False) -> None:
        self._attempts.save(trainer, self._ready, path, self.save_weights_only, asynchronous, gives_up)
        self._ready.tidy()
        self._pause(trainer.global_step)

    def _pause(self, step: int) -> None:
        """Until the next update that may end an interval, or the next one while a write in the background is due."""
        self.paused_until = step + 1
        if not self._ready.waiting and not self.train_time_interval:
            every = self.every_n_train_steps
            self.paused_until = step + every - step % every if every else sys.maxsize

    def _waits_for_validation(self, trainer: Trainer) -> bool:
        """Whether the monitored metric is one of validation, so that a save has to wait for the next one."""
        if self.monitor is None or not trainer.validation_enabled:
            return False
        if self._validation_metric is None and self.monitor in trainer.callback_metrics:
            # Validation would have been noticed: training has logged it.
            self._validation_metric = False
        return self._validation_metric is not False

    def _saves_after_validations(self, trainer: Trainer) -> bool:
        """Whether what is due in an epoch is saved after each of its validations, and not at its end."""
        if self.save_on_train_epoch_end is not None:
            return not self.save_on_train_epoch_end and self._known(trainer)
        return bool(self._validation_metric) and not validates_once_per_epoch(trainer)

    def _known(self, trainer: Trainer) -> bool:
        """Whether the monitored metric, if there is one, was logged by now."""
        return self.monitor is None or self.monitor in trainer.callback_metrics

    def _epoch_due(self, trainer: Trainer) -> bool:
        return bool(self.every_n_epochs) and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    @property
    def _ready(self) -> CheckpointShelf:
        assert self._shelf is not None, "setup was not called"
        return self._shelf
