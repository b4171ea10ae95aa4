"""What the Trainer's verbs do with a `Run`: set-up, the loops, and one way out for success, errors and interrupts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from nnx_fit.callbacks.callback import keyed
from nnx_fit.callbacks.finder import Finder, GivenData
from nnx_fit.callbacks.monitor import check_monitored
from nnx_fit.checkpoint.saving import Loaded
from nnx_fit.data.sources import Source
from nnx_fit.errors import ConfigurationError
from nnx_fit.interrupts import end_with, ends_at_once, watched
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.logger import Status
from nnx_fit.loops.evaluate import renamer
from nnx_fit.loops.fit import FitLoop
from nnx_fit.loops.progress import Interrupted
from nnx_fit.loops.validation_plan import ValidationPlan
from nnx_fit.optimizers import BoundOptimizer, bind, is_transformation, resolve
from nnx_fit.options import Options
from nnx_fit.plateaus import drive
from nnx_fit.programs.train import TrainProgram
from nnx_fit.run import Run


@contextmanager
def session(
    run: Run, datamodule: Any, loggers: FanOut, on_interrupt: Callable[[], None], settle: Callable[[], None]
) -> Iterator[None]:
    """Sets a verb up and ends it: whatever happens inside, hooks run, and the module holds its values and mode.

    Args:
        run: The run.
        datamodule: Its data module, or `None`.
        loggers: Its loggers.
        on_interrupt: Called when a signal ended the run.
        settle: Waits for what is written in the background.
    """
    status: Status = "failed"
    interrupted: int | None = None
    cause: BaseException | None = None
    with watched(run.control), run.opened():
        try:
            try:
                if datamodule is not None:
                    _call(datamodule, "prepare_data")
                    _call(datamodule, "setup", run.verb)
                run.funnel.call("setup", run.verb)
                yield
                status = "success"
                if run.control.signal is not None:  # it came when no step was left to end after
                    status, interrupted = "interrupted", run.control.signal
                    on_interrupt()
            except Interrupted as interrupt:
                status, interrupted = "interrupted", interrupt.signal
                on_interrupt()
                run.ledger.drain()
                ending = KeyboardInterrupt() if interrupted == signal.SIGINT else SystemExit(143)
                run.funnel.call("on_exception", ending)
                _end_hooks(run)
        except BaseException as error:
            cause = error
            if interrupted is None and not _at_once(run, error):
                _report(run, error)
            raise
        finally:
            steps: list[Callable[[], Any]] = [run.show]
            if not _at_once(run, cause):
                steps.append(lambda: run.funnel.call("teardown", run.verb))
                if datamodule is not None:
                    steps.append(lambda: _call(datamodule, "teardown", run.verb))
                steps.append(settle)
            error = _clean_up([*steps, lambda: loggers.finalize(status)], cause)
            if error is not None and cause is None:
                raise error
    if interrupted is None and run.control.signal is not None:  # it came during the clean-up
        interrupted = run.control.signal
        on_interrupt()
    if interrupted is not None:
        end_with(interrupted)


def _at_once(run: Run, cause: BaseException | None) -> bool:
    """Whether a second signal ends the run: no hook may delay it."""
    return run.control.signal is not None and isinstance(cause, KeyboardInterrupt | SystemExit)


def _clean_up(steps: Sequence[Callable[[], Any]], cause: BaseException | None) -> BaseException | None:
    """Runs every step: an error in one neither stops the others nor takes the place of what ended the run.

    Returns:
        The cause, or else the first error.
    """
    for step in steps:
        try:
            step()
        except Exception as error:
            if cause is None:
                cause = error
            else:
                cause.add_note(f"While the run was ended, another error occurred: {type(error).__name__}: {error}")
    return cause


def _end_hooks(run: Run) -> None:
    if run.verb == "fit" and run.live is not None:
        with run.staged("train"):
            run.funnel.call("on_train_end")
        run.ledger.drain()
        run.funnel.call("on_fit_end")


def _report(run: Run, error: BaseException) -> None:
    """Tells callbacks of an error; one of theirs must not take its place."""
    _clean_up([run.ledger.drain, run.show, lambda: run.funnel.call("on_exception", error)], error)


def _call(datamodule: Any, method: str, *args: Any) -> None:
    if callable(getattr(datamodule, method, None)):
        getattr(datamodule, method)(*args)


def find_settings(run: Run, data: GivenData, checkpoint: Loaded | None) -> None:
    """Lets finders choose their settings, in list order, before anything is built that depends on them.

    Args:
        run: The run, set up.
        data: What it was given to run on.
        checkpoint: What it continues from, or `None`.

    Raises:
        Interrupted: A signal ended a search.
    """
    for key, callback in keyed(run.callbacks):
        if not isinstance(callback, Finder):
            continue
        saved = None if checkpoint is None else checkpoint.meta["callbacks"].get(key, {})
        try:
            callback.ask(run.trainer, run.module, data, saved)
        except (KeyboardInterrupt, SystemExit) as ending:
            if run.control.signal is None or ends_at_once(ending):
                raise
            raise Interrupted(run.control.signal) from None  # the trial has ended as a run does


def choose_optimizers(
    run: Run, setting: Any, estimated_steps: int | float, has_own: bool
) -> tuple[BoundOptimizer, ...]:
    """The optimizers of a fit: the module's, or the Trainer's when the module has none.

    Args:
        run: The run.
        setting: `Trainer(optimizer=...)`.
        estimated_steps: Number of updates the fit will make, for schedules.
        has_own: Whether the module overrides `configure_optimizers`.

    Raises:
        ConfigurationError: There is none, or both.
    """
    name = type(run.module).__name__
    if has_own and setting is not None:
        raise ConfigurationError(
            f"{name}.configure_optimizers and Trainer(optimizer=...) both say how to train; one would be ignored.\n"
            "Fix: remove one of them."
        )
    if has_own:
        return bind(run.module.configure_optimizers(), origin=f"{name}.configure_optimizers")
    if setting is None:
        raise ConfigurationError(
            f"There is no optimizer: {name} has no configure_optimizers, and Trainer(optimizer=...) was not given.\n"
            "Fix: define `def configure_optimizers(self): return optax.adam(1e-3)`, or pass `optimizer=`."
        )
    return bind(resolve(setting, estimated_steps), origin="Trainer(optimizer=...)")


def check_optimizer_setting(setting: Any) -> None:
    """Refuses a `Trainer(optimizer=...)` that can be none, before anything is built."""
    if setting is not None and not callable(setting) and not is_transformation(setting):
        bind(setting, origin="Trainer(optimizer=...)")


def validation_plan(options: Options, run: Run, source: Source | None, training_batches: int | float) -> ValidationPlan:
    """When a fit validates.

    Raises:
        ConfigurationError: An interval is longer than an epoch, or a fraction of an unknown length.
    """
    if source is None or not any(source.limits):
        return ValidationPlan(None)

    def validate(recorded: Callable[[], None]) -> None:
        _renewed(run, source)
        run.evaluate("validate", source, recorded=recorded)

    def finish() -> None:
        with run.staged("validate"):
            run.funnel.call("on_validation_end")

    between = _batches_between(options, training_batches)
    return ValidationPlan(validate, between, options.check_val_every_n_epoch, finish)


def _batches_between(options: Options, training_batches: int | float) -> int | None:
    """Training batches between two validations; `None`: they are at the end of epochs."""
    interval = options.val_check_interval
    if isinstance(interval, int):
        if options.check_val_every_n_epoch is not None and interval > training_batches:
            raise ConfigurationError(
                f"Trainer(val_check_interval={interval}): an epoch has only {training_batches} training batches, so "
                "validation would never run. Fix: lower it, or pass check_val_every_n_epoch=None to count batches "
                "across epochs."
            )
        return interval
    if interval == 1.0:
        return None
    if training_batches == float("inf"):
        raise ConfigurationError(
            f"Trainer(val_check_interval={interval}): the training loader has no length to take a fraction of.\n"
            "Fix: pass a whole number of batches."
        )
    return max(1, int(training_batches * interval))


def _renewed(run: Run, source: Source) -> bool:
    """Asks for the loaders of a source again where that is due; the module, which may be whom to ask, is up to date."""
    epoch = run.progress.epoch
    if not source.due(epoch):
        return False
    run.show()
    source.renew(epoch)
    return True


def sanity_check(run: Run, source: Source | None) -> None:
    """Runs a few validation batches before training, so that a mistake there does not show after hours only.

    A run that continues had its check, and nothing may change what it continues with.
    """
    count = run.options.num_sanity_val_steps
    if source is None or count == 0 or not any(source.limits) or run.progress.batches:
        return
    run.funnel.call("on_sanity_check_start")
    run.evaluate("validate", source, sanity=2**31 if count == -1 else count)
    run.funnel.call("on_sanity_check_end")


def train(run: Run, source: Source, plan: ValidationPlan, resumed_pass: Any, on_first_step: Callable[[], None]) -> None:
    """Runs the fit loop.

    Args:
        run: The run, built and with its train program.
        source: Training data.
        plan: When to validate.
        resumed_pass: Position in the training data to continue from, or `None`.
        on_first_step: Called once a step was made, so that a run that cannot make one leaves nothing behind.
    """
    pending = [resumed_pass]

    def first_step_made() -> None:
        names = run.all_metric_names() if plan.run is None or run.has_validated else None
        if names is not None:
            check_monitored([*run.callbacks, *run.trainer.optimizers], names)
        on_first_step()

    def open_batches() -> Any:
        state, pending[0] = pending[0], None
        epoch = run.progress.epoch
        if _renewed(run, source):
            plan.every_batches = _batches_between(run.options, source.limits[0])
        if state is not None and not run.progress.in_epoch:
            if source.block_of(epoch - 1) == source.block_of(epoch):
                # That pass was over; it leaves the loader where the next one begins.
                source.open(epoch=epoch - 1, state=state).close()
            state = None
        run.batches = source.open(epoch=epoch, state=state)
        return run.profile.batches("train_dataloader", run.batches)

    def refreshed(in_epoch: bool) -> TrainProgram:
        (run.refresh_in_epoch if in_epoch else run.refresh)()
        if not in_epoch:
            drive(run.trainer.optimizers, run.ledger, expected=run.progress.epoch > 0)
        return timed_steps()

    def timed_steps() -> TrainProgram:
        assert run.train_program is not None
        return run.profile.steps("training_step", run.train_program)

    with run.staged("train"):
        FitLoop(
            run.options,
            run.progress,
            run.control,
            run.funnel,
            run.ledger,
            timed_steps(),
            open_batches,
            plan,
            first_step_made,
            refreshed=refreshed,
        ).run()


def evaluate(run: Run, stage: str, source: Source) -> list[dict[str, float]]:
    """Runs one eval loop as a verb of its own; returns the metrics of each loader."""
    done = run.evaluate(stage, source)
    run.ledger.drain()
    results = [
        run.ledger.read_epoch(program.table, program.accumulators, renamer(name))
        for program, name in zip(done.programs, done.names, strict=True)
    ]
    results[0] |= done.logged
    return results


def predict(run: Run, source: Source) -> list[Any]:
    """Runs prediction; returns host pytrees, one for each batch, grouped by loader when there are several."""
    outputs: list[list[Any]] = [[] for _ in source.loaders]

    def keep(index: int, output: Any) -> None:
        mine = outputs[index]
        mine.append(output)
        # One batch late, so that the copy to the host overlaps with the next step.
        if len(mine) > 1:
            mine[-2] = jax.device_get(mine[-2])

    run.evaluate("predict", source, keep=keep)
    fetched = jax.device_get(outputs)
    return fetched[0] if len(fetched) == 1 else fetched
