"""Which callbacks a Trainer has: the user's, and those that its `enable_*` arguments and loggers bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.early_stopping import EarlyStopping
from nnx_fit.callbacks.learning_rate_monitor import LearningRateMonitor
from nnx_fit.callbacks.model_checkpoint import ModelCheckpoint
from nnx_fit.callbacks.model_summary import ModelSummary
from nnx_fit.callbacks.profiler import ProfilerCallback
from nnx_fit.callbacks.progress_bar import RichProgressBar
from nnx_fit.callbacks.variable_monitor import VariableMonitor
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Logger
from nnx_fit.loggers.tensorboard import TensorBoardLogger
from nnx_fit.options import Options


def with_defaults(
    given: Any, options: Options, loggers: Sequence[Logger], tracer: ProfilerCallback | None = None
) -> list[Callback]:
    """The callbacks of a run.

    Args:
        given: `Trainer(callbacks=...)`: a callback, an iterable of them, or `None`.
        options: The Trainer's options.
        loggers: The Trainer's loggers.
        tracer: What `Trainer(profiler=...)` brings.

    Raises:
        ConfigurationError: Something is no callback, or is what an `enable_*` argument or `barebones` switches off.
    """
    callbacks = _listed(given)
    if tracer is not None and not _has(callbacks, ProfilerCallback):
        callbacks.append(tracer)
    if options.fast_dev_run:
        return [
            *(callback for callback in callbacks if not isinstance(callback, EarlyStopping | ModelCheckpoint)),
            *_screen(callbacks, options),
        ]
    _refuse_switched_off(callbacks, options)
    extra = _screen(callbacks, options)
    if any(isinstance(logger, TensorBoardLogger) for logger in loggers) and not _has(callbacks, VariableMonitor):
        extra.append(VariableMonitor())
    if any(isinstance(logger, TensorBoardLogger) for logger in loggers) and not _has(callbacks, LearningRateMonitor):
        extra.append(_unasked(LearningRateMonitor()))
    if options.enable_checkpointing and not _has(callbacks, ModelCheckpoint):
        extra.append(ModelCheckpoint())
    return [*callbacks, *extra]


def _refuse_switched_off(callbacks: Sequence[Callback], options: Options) -> None:
    # A progress bar that is given beside `enable_progress_bar=False` is just that: none comes by itself.
    for kind, on, argument, what in (
        (ModelCheckpoint, options.enable_checkpointing, "enable_checkpointing", "checkpoints"),
        (RichProgressBar, not options.barebones, "barebones", "a progress bar"),
    ):
        if _has(callbacks, kind) and not on:
            because = "barebones=True" if options.barebones else f"{argument}=False"
            raise ConfigurationError(
                f"Trainer({because}, callbacks=[..., {kind.__name__}]): one asks for no {what.removeprefix('a ')}, the "
                f"other for {what}. Fix: drop one of them."
            )


def _screen(callbacks: Sequence[Callback], options: Options) -> list[Callback]:
    extra: list[Callback] = []
    if options.enable_model_summary and not _has(callbacks, ModelSummary):
        extra.append(ModelSummary())
    if options.enable_progress_bar and not _has(callbacks, RichProgressBar):
        extra.append(RichProgressBar())
    return extra


def _unasked(monitor: LearningRateMonitor) -> LearningRateMonitor:
    monitor.asked_for = False
    return monitor


def _has(callbacks: Iterable[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _listed(given: Any) -> list[Callback]:
    if given is None:
        return []
    callbacks = [given] if isinstance(given, Callback) or not isinstance(given, Iterable) else list(given)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"Trainer(callbacks=...) got a {type(callback).__name__}"
                f"{' class' if isinstance(callback, type) else ''}, which is no Callback instance.\n"
                "Fix: pass instances of nnx_fit.Callback (its hooks take the trainer and the module first)."
            )
    return callbacks
