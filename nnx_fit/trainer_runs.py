"""`TrainerRuns`: how a verb of the Trainer is begun, recorded and ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nnx_fit import verbs
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.model_checkpoint import ModelCheckpoint
from nnx_fit.checkpoint.saving import Checkpoints
from nnx_fit.data.datamodule import DataModule
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.environment import environment_text
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.hyperparams import yaml_text
from nnx_fit.loggers.logger import Logger
from nnx_fit.metrics.history import History
from nnx_fit.module import FitModule
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.profiling import Profile
from nnx_fit.run import Run
from nnx_fit.trainer_data import TrainerData
from nnx_fit.trainer_views import TrainerViews


class TrainerRuns(TrainerViews, TrainerData):
    """What the verbs share."""

    callbacks: list[Callback]
    history: History
    datamodule: Any
    settings: dict[str, Any]
    texts: dict[str, str]
    interrupted: bool
    _arguments: dict[str, Any]
    _optimizer: Any
    _fan_out: FanOut
    _checkpoints: Checkpoints
    _profile: Profile
    _log_metrics: Callable[..., None]
    _run: Run | None

    def _check_idle(self, verb: str) -> None:
        """Refuses a verb within a verb: there is one record of where a Trainer is, and checkpoints are made of it."""
        if self._run is not None and self._run.open:
            raise ConfigurationError(
                f"Trainer.{verb} was called while this Trainer's {self._run.verb} is under way, which it would break.\n"
                "Fix: use another Trainer in the hook, for example Trainer(logger=False, enable_checkpointing=False)."
            )

    def _start(self, verb: str, module: FitModule, datamodule: Any) -> Run:
        self.datamodule = datamodule
        if isinstance(datamodule, DataModule):
            with suppress(AttributeError):  # a frozen one does without
                datamodule.trainer = self
        self._run = Run(
            self,
            module,
            verb,
            self.options,
            self.callbacks,
            self._progress,
            self._control,
            self._ledger,
            self._profile,
        )
        return self._run

    @contextmanager
    def _session(self, run: Run) -> Iterator[None]:
        """A verb from its set-up to its end, profiled."""
        writes = not (self.options.barebones or self.options.fast_dev_run)
        with (
            self._profile.of(run.verb, lambda: self.log_dir if writes else None),
            verbs.session(run, self.datamodule, self._fan_out, self._note_interrupt, self._checkpoints.wait),
        ):
            yield

    def _choose_optimizers(self, run: Run) -> tuple[BoundOptimizer, ...]:
        has_own = type(run.module).configure_optimizers is not FitModule.configure_optimizers
        return verbs.choose_optimizers(run, self._optimizer, self.estimated_steps, has_own)

    def _settings_record(self, module: FitModule) -> Callable[[], None]:
        """What hands the run's settings to the loggers, as they are now."""
        settings, texts = self.settings or module.hparams, dict(self.texts)
        texts["partition"] = f"```\n{self.partition.table()}\n```"
        model = {"_target_": f"{type(module).__module__}.{type(module).__qualname__}", **module.hparams}
        texts.setdefault("config", yaml_text({"trainer": self._arguments, "model": model}))
        self._config = texts["config"]

        def log() -> None:
            if not self.loggers:
                return
            texts.setdefault("environment", environment_text())
            self._fan_out.log_hyperparams(settings)
            for tag, text in texts.items():
                self._fan_out.log_text(tag, text)

        return log

    def _publish(self, metrics: dict[str, float], step: int) -> None:
        self._log_metrics(metrics, step)

    def _note_interrupt(self) -> None:
        self.interrupted = True

    def _running(self) -> Run:
        if self._run is None or self._run.live is None:
            raise ConfigurationError("There is nothing to save yet. Fix: call save_checkpoint in a hook, or after fit.")
        return self._run

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return self._fan_out.loggers

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first `ModelCheckpoint`, if there is one."""
        return next((callback for callback in self.callbacks if isinstance(callback, ModelCheckpoint)), None)
