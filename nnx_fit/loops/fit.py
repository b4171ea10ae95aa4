"""The fit loop: epochs, steps, validation where it is due, and every reason to stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from nnx_fit.errors import ConfigurationError
from nnx_fit.loops.funnel import Funnel
from nnx_fit.loops.progress import TIME_IS_UP, Control, Interrupted, Progress
from nnx_fit.loops.validation_plan import ValidationPlan
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.options import Options

logger = logging.getLogger("nnx_fit")


class Steps(Protocol):
    """What the loop needs of the train program."""

    table: Any
    skipped: bool  # whether the last step was to update and did not

    @property
    def accumulators(self) -> Any:
        """The epoch's metrics so far."""

    def run(self, batch: Any, step: int, updates: bool = True) -> tuple[Any, Any]:
        """Dispatches one step; returns its packed metrics and its outputs."""
        ...

    def set_counters(self, global_step: int, epoch: int, batch_idx: int) -> None:
        """Sets what the next step sees."""

    def reset_accumulators(self) -> None:
        """Starts a new epoch of metrics."""


class FitLoop:
    """Runs the epochs of a fit.

    Args:
        options: What was asked for.
        progress: Where the run is; the loop alone changes it.
        control: Requests to stop.
        funnel: Calls hooks.
        ledger: Takes metrics.
        steps: The train program.
        open_batches: Opens one pass over the training data, in an epoch from a batch index.
        validation: When and how to validate.
        on_first_step: Called when a first step was made, or at the end if there was none to make.
        clock: Seconds, monotonic.
        refreshed: Gives the train program after hooks may have changed the module; its argument tells whether an epoch
            is under way.
    """

    def __init__(
        self,
        options: Options,
        progress: Progress,
        control: Control,
        funnel: Funnel,
        ledger: Ledger,
        steps: Steps,
        open_batches: Callable[[], Any],
        validation: ValidationPlan,
        on_first_step: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        refreshed: Callable[[bool], Steps] | None = None,
    ):
        self._options = options
        self._progress = progress
        self._control = control
        self._funnel = funnel
        self._ledger = ledger
        self._steps = steps
        self._open_batches = open_batches
        self._validation = validation
        self._on_first_step: Callable[[], None] | None = on_first_step
        self._first_epoch = True
        self._clock = clock
        self._refreshed = refreshed or (lambda in_epoch: steps)
        self._deadline = None if options.max_time is None else clock() + options.max_time

    def run(self) -> None:
        """Trains until a bound is reached, somebody stops it, or a signal ends it."""
        progress = self._progress
        if not progress.in_epoch:
            # Saved in a hook that begins something, which is called again: what it logged is not to count twice.
            self._ledger.forget_host_epoch("train")
        self._start("on_train_start", again=progress.in_epoch or progress.batches > 0)
        if progress.epoch_recorded or self._ended_early():
            self._call_epoch_end(again=True)
        if progress.epoch_recorded:
            self._next_epoch()
        while not self._finished() or self._cut_short():
            self._epoch()
        self._begin()
        self._ledger.drain()
        self._funnel.call("on_train_end")
        self._ledger.drain()

    def _finished(self) -> bool:
        progress, options = self._progress, self._options
        if options.limit_train_batches == 0:
            return True
        return progress.epoch >= options.epoch_limit or self._stopped()

    def _stopped(self) -> bool:
        """Whether training ends before the next step, for a reason other than the number of epochs."""
        if self._progress.global_step >= self._options.step_limit:
            return True
        if self._progress.window:
            return False  # the batches of a window end in an update
        if self._deadline is not None and not self._control.should_stop and self._clock() >= self._deadline:
            self._control.should_stop, self._control.stop_reason = True, TIME_IS_UP
        return self._control.should_stop and self._minimum_reached()

    def _cut_short(self) -> bool:
        """Whether a run that continues was saved after its last step, and the end of that epoch is still to come."""
        progress = self._progress
        return progress.in_epoch and progress.batch_idx > 0 and self._stopped() and not self._ended_early()

    def _ended_early(self) -> bool:
        progress = self._progress
        return progress.in_epoch and progress.ended_step == progress.global_step

    def _minimum_reached(self) -> bool:
        options, progress = self._options, self._progress
        return progress.epoch >= (options.min_epochs or 0) and progress.global_step >= (options.min_steps or 0)

    def _epoch(self) -> None:
        progress = self._progress
        if not progress.in_epoch:
            progress.batch_idx = 0
            self._steps.reset_accumulators()
        self._steps.set_counters(progress.global_step, progress.epoch, progress.batch_idx)
        self._start("on_train_epoch_start", again=progress.in_epoch)
        self._steps = self._refreshed(False)
        batches = self._open_batches()
        progress.in_epoch = True
        try:
            if progress.batch_idx:
                self._catch_up()
            self._funnel.load_state_dict(None)
            over = progress.batch_idx > 0 and self._stopped()
            complete = batches.exhausted if over else self._batches(batches)
        finally:
            batches.close()
        self._end_epoch(complete)

    def _start(self, hook: str, again: bool) -> None:
        """Calls a hook that begins something; `again`: for a run that continues, whose first part has its records."""
        with self._ledger.unrecorded("train") if again else contextlib.nullcontext():
            self._funnel.call(hook)

    def _catch_up(self) -> None:
        """Does what a run that was saved between a batch and its log point or validation had still to do."""
        progress, log_every = self._progress, self._options.log_every_n_steps
        if self._funnel.resumes("on_train_batch_end"):
            self._funnel.call_rest("on_train_batch_end", None, None, progress.batch_idx - 1)
        if log_every and not progress.window and progress.global_step % log_every == 0:
            self._ledger.log_host_step(progress.global_step)
        if progress.validated_step != progress.global_step and self._validation.due_after_batch(progress):
            self._validate()
            self._steps = self._refreshed(False)
        elif self._funnel.resumes("on_validation_end"):
            self._validation.finish()
            self._steps = self._refreshed(False)

    def _batches(self, batches: Any) -> bool:
        """Trains on the batches of an epoch; returns whether it got to the end of them."""
        funnel, ledger, progress, steps = self._funnel, self._ledger, self._progress, self._steps
        starts, ends_from = funnel.overridden("on_train_batch_start"), funnel.paused_until("on_train_batch_end")
        log_every = self._options.log_every_n_steps
        table = steps.table
        for batch in batches:
            batch_idx = progress.batch_idx
            if starts and any(map(_skips, funnel.call("on_train_batch_start", batch.full, batch_idx))):
                return True
            if funnel.looked:
                steps = self._steps = self._refreshed(True)
            updates = progress.window + 1 >= self._control.accumulate or batches.exhausted
            packed, outputs = steps.run(batch.numeric, progress.global_step + 1, updates)
            if self._on_first_step is not None:
                self._begin()
            step = progress.advance(updates, steps.skipped)
            progress.batch_idx += 1
            progress.batches += 1
            ledger.step(table, packed)
            logs = updates and not steps.skipped and log_every and step % log_every == 0
            if logs:
                ledger.log_step(step)
            if step >= ends_from:
                funnel.call("on_train_batch_end", outputs, batch.full, batch_idx)
                ends_from = funnel.paused_until("on_train_batch_end")
            if logs:
                ledger.log_host_step(step)
            if ledger.pending:
                ledger.poll()
            if self._validation.due_after_batch(progress):
                self._validate()
                steps = self._steps = self._refreshed(False)
            self._control.after_batch(progress.batches)
            if self._control.signal is not None:
                raise Interrupted(self._control.signal)
            if self._stopped():
                return batches.exhausted
        if progress.batch_idx == 0:
            raise ConfigurationError(
                "The training loader yielded no batch, so no step can be made.\n"
                "Fix: check that the data is not empty and that batch_size (with drop_last) leaves at least one batch."
            )
        return True

    def _begin(self) -> None:
        begin, self._on_first_step = self._on_first_step, None
        if begin is not None:
            begin()

    def _end_epoch(self, complete: bool) -> None:
        progress, plan = self._progress, self._validation
        if complete and self._first_epoch and plan.never_due(progress.batch_idx):
            logger.warning(
                "Trainer(val_check_interval=%d): an epoch has only %d training batches, so validation never runs. "
                "Fix: lower it, or pass check_val_every_n_epoch=None to count batches across epochs.",
                plan.every_batches,
                progress.batch_idx,
            )
        self._first_epoch = False
        due = plan.due_after_epoch(progress) if complete else plan.run is not None
        if due and progress.validated_step != progress.global_step:
            self._validate()
            self._steps = self._refreshed(False)
        self._ledger.log_epoch(progress.global_step, self._steps.table, self._steps.accumulators, str)
        progress.epoch_recorded = complete
        progress.ended_step = -1 if complete else progress.global_step
        self._call_epoch_end()
        if complete:
            self._next_epoch()
        self._ledger.poll()
        if self._control.signal is not None:
            raise Interrupted(self._control.signal)

    def _call_epoch_end(self, again: bool = False) -> None:
        """Calls the last hook of an epoch; `again`: for a run that continues, those who have not heard of it."""
        calls = not again or self._funnel.resumes("on_train_epoch_end")
        if calls:
            self._funnel.call("on_train_epoch_end", phases=("before",))
        self._ledger.log_host_epoch("train", self._progress.global_step)
        if calls:
            self._funnel.call("on_train_epoch_end", phases=("decide", "save"))

    def _next_epoch(self) -> None:
        self._progress.epoch += 1
        self._progress.in_epoch = self._progress.epoch_recorded = False

    def _validate(self) -> None:
        progress = self._progress

        def recorded() -> None:
            progress.validated_step = progress.global_step

        assert self._validation.run is not None
        self._validation.run(recorded)


def _skips(answer: Any) -> bool:
    """Whether a hook skips the rest of the epoch: Lightning's way is to return -1."""
    return isinstance(answer, int) and answer == -1
