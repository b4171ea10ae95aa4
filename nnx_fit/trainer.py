"""`Trainer`: checks its arguments, wires the parts together, and offers the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnx_fit import verbs
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.defaults import with_defaults
from nnx_fit.callbacks.finder import GivenData
from nnx_fit.callbacks.profiler import ProfilerCallback
from nnx_fit.checkpoint.saving import Checkpoints
from nnx_fit.data.sources import find_loaders
from nnx_fit.determinism import ask_for_deterministic_kernels
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.logger import Logger
from nnx_fit.loops.progress import Control, Progress
from nnx_fit.metrics.history import History
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.module import FitModule
from nnx_fit.optimizers import trained
from nnx_fit.options import make_options
from nnx_fit.run import Run
from nnx_fit.trainer_data import as_datamodule, check_module
from nnx_fit.trainer_runs import TrainerRuns
from nnx_fit.trainer_setup import make_loggers, make_profilers, run_directory


class Trainer(TrainerRuns):
    """Runs a `FitModule`: trains, validates, tests, predicts.

    Every argument is keyword-only. A float limit is a fraction (1.0 is all), an int a count, 0 disables.

    Args:
        max_epochs: Number of epochs; -1 for no limit. `None` with no other bound means 1000, and warns.
        min_epochs: Epochs to train before anything but a hard bound may stop the run.
        max_steps: Number of updates; -1 for no limit.
        min_steps: Updates to make before anything but a hard bound may stop the run.
        max_time: Training time: `"DD:HH:MM:SS"`, a `timedelta`, or a dict of its arguments.
        limit_train_batches: Batches of an epoch.
        limit_val_batches: Batches of a validation, of each loader.
        limit_test_batches: Batches of a test, of each loader.
        limit_predict_batches: Batches of a prediction, of each loader.
        overfit_batches: Train and validate on these few batches, the same in every epoch.
        fast_dev_run: Run 1 (or this many) batches of everything once, and write nothing.
        num_sanity_val_steps: Validation batches to run before training; -1 for all.
        val_check_interval: Validate after this fraction of an epoch, or this many training batches.
        check_val_every_n_epoch: Validate in every n-th epoch; `None` lets `val_check_interval` count across epochs.
        log_every_n_steps: Updates between two records of step metrics; 0 for none.
        steps_per_call: Updates in one compiled call.
        accumulate_grad_batches: Batches in an update, which is made from the mean of their gradients weighted by batch
            size. The last window of an epoch may be shorter. Statistics and RNG streams advance with every batch.
        gradient_clip_val: Largest global norm of the gradients, or largest value of each; `None` or 0 for no limit.
        gradient_clip_algorithm: What is limited: `"norm"` or `"value"`.
        precision: `"32"`; `"bf16-mixed"`: steps compute in bfloat16 and see parameters and batches in it, while
            parameters and optimizer are kept in float32; `"bf16-true"`: parameters and optimizer, too, are bfloat16;
            `"16-mixed"`: float16 with a dynamic loss scale: an update whose gradients overflow is skipped and not
            counted. Running statistics are float32 in each of them.
        optimizer: What `configure_optimizers` may return, or a callable of the estimated number of steps that returns
            it; for modules that do not override that method.
        callbacks: A callback or a list of them.
        logger: `True` for a `TensorBoardLogger`, `False` for none, a logger or a list of them.
        default_root_dir: Directory of the run; by default `outputs/<date>/<time>-<id>`.
        enable_checkpointing: Add a `ModelCheckpoint` if there is none.
        enable_progress_bar: Add a `RichProgressBar` if there is none.
        enable_model_summary: Add a `ModelSummary` if there is none.
        state_guard: What to do about state that a step should not change.
        detect_nonfinite: Check every value of each step, and stop at the first that is NaN or infinite. Waits for
            each step: for debugging.
        deterministic: Reproducible kernels on GPU, which may be slower: sets the environment variable `XLA_FLAGS`. JAX
            reads it when it starts, with the first array; a Trainer that is made later says so. CPUs need none.
        profiler: `"simple"`: a table of the time in hooks, steps and loaders at the end of each verb; `"advanced"`: of
            each Python function, by `cProfile`; both are printed and saved in `log_dir` as `profile-<verb>.txt`.
            `"jax"`, or a `ProfilerCallback`: a trace of a few updates for TensorBoard.
        barebones: Switch off everything that is not training.
        jit: Compile the steps; `False` runs them eagerly, for debugging.
        strategy: How arrays are spread over devices.
        devices: Which devices to use.
        reload_dataloaders_every_n_epochs: Ask the data module, or the module, for the training and validation loaders
            again in epochs n, 2n, ...; their methods may go by `trainer.current_epoch`, which is that epoch also
            where a run continues later on. 0: once. Loaders that were passed to `fit`, and `overfit_batches`, stay.

    Raises:
        ConfigurationError: An argument is invalid or contradicts another one.

    Attributes:
        options: The plain arguments, validated.
        callbacks: All callbacks, those added by default included.
        loggers: All loggers.
        history: Every logged value of the last `fit`.
        texts: Markdown texts by tag that `fit` logs, besides `config` (the arguments, unless it is given here),
            `partition` and `environment`.
        settings: What `fit` logs as hyperparameters; by default, when it is empty, the module's `hparams`.
        interrupted: Whether a signal ended the last `fit`.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Any = None,
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        limit_test_batches: int | float = 1.0,
        limit_predict_batches: int | float = 1.0,
        overfit_batches: int | float = 0.0,
        fast_dev_run: int | bool = False,
        num_sanity_val_steps: int = 2,
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int | None = 1,
        log_every_n_steps: int = 50,
        steps_per_call: int | str = "auto",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        precision: str | int = "32",
        optimizer: Any = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: Logger | Sequence[Logger] | bool | None = True,
        default_root_dir: str | Path | None = None,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        state_guard: str = "error",
        detect_nonfinite: bool = False,
        deterministic: bool = False,
        profiler: str | ProfilerCallback | None = None,
        barebones: bool = False,
        jit: bool = True,
        strategy: Any = "auto",
        devices: int | str = "auto",
        reload_dataloaders_every_n_epochs: int = 0,
    ):
        arguments = dict(locals())
        arguments.pop("__class__", None)
        for name in ("self", "optimizer", "callbacks", "logger", "default_root_dir", "profiler"):
            del arguments[name]
        super().__init__()
        self._arguments = arguments
        self.options = make_options(**arguments)
        if self.options.deterministic:
            ask_for_deterministic_kernels()
        verbs.check_optimizer_setting(optimizer)
        self._optimizer = optimizer
        self.default_root_dir = run_directory(default_root_dir)
        self._profile, tracer = make_profilers(profiler, self.options)
        self._fan_out = FanOut(make_loggers(logger, self.default_root_dir, self.options))
        self._log_metrics = self._profile.timed("loggers.log_metrics", self._fan_out.log_metrics)
        self.callbacks = with_defaults(callbacks, self.options, self.loggers, tracer)
        self._checkpoints = Checkpoints()
        self._progress = Progress()
        self._control = Control()
        self.history = History()
        self._ledger = Ledger(self.history, self._publish, self._fan_out.log_drawing)
        self._run: Run | None = None
        self.datamodule: Any = None
        self.settings: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self._config = ""
        self.interrupted = False
        self._publishing = False

    def fit(
        self,
        module: FitModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> History:
        """Trains a module.

        Args:
            module: The module; it holds the trained values afterwards.
            train_dataloaders: Training data: a re-iterable of batches.
            val_dataloaders: Validation data, or a list or dict of loaders; without it there is no validation.
            datamodule: A `DataModule` instead of loaders.
            ckpt_path: Continue from this checkpoint: a path, `"last"` or `"best"`.

        Returns:
            Every logged value with its step.

        Raises:
            ConfigurationError: Something does not fit together; the module is unchanged.
            KeyboardInterrupt: After SIGINT, once everything is saved and consistent.
        """
        self._check_idle("fit")
        datamodule, train_dataloaders = as_datamodule(train_dataloaders, datamodule)
        check_module(module, "training_step", "fit")
        self._progress, self._control = Progress(), Control(self.options.accumulate_grad_batches)
        for callback in self.callbacks:
            callback.paused_until = 0
        self.history = History()
        self._ledger = Ledger(self.history, self._publish, self._fan_out.log_drawing)
        self.interrupted = False
        run = self._start("fit", module, datamodule)
        with self._session(run):
            checkpoint = self._checkpoints.open(ckpt_path, run)
            self.resumed_from = str(checkpoint.path) if checkpoint is not None else None
            self._checkpoints.restore_position(checkpoint, run)
            given = GivenData("fit", train_dataloaders, val_dataloaders, datamodule)
            verbs.find_settings(run, given, checkpoint)
            source = self._train_source(train_dataloaders, datamodule, module)
            validation = self._val_source(module, val_dataloaders, datamodule)
            self._plan = verbs.validation_plan(self.options, run, validation, self.num_training_batches)
            optimizers = self._choose_optimizers(run)
            run.trainable = trained(optimizers, module.trainable)
            if ckpt_path is not None and checkpoint is None:
                self._fan_out.continue_from(-1)  # a fresh start where an earlier run may have logged
            self._checkpoints.restore_host(checkpoint, run, self._fan_out, self.history, optimizers)
            log_settings = self._settings_record(module)
            run.funnel.call("on_fit_start")
            run.build()
            run.build_train_program(optimizers)
            position = self._checkpoints.restore_arrays(checkpoint, run)
            verbs.sanity_check(run, validation)
            verbs.train(run, source, self._plan, position, log_settings)
            run.funnel.call("on_fit_end")
        return self.history

    def validate(
        self,
        module: FitModule,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[dict[str, float]]:
        """Runs validation; returns the metrics of each loader.

        Args:
            module: The module; unchanged afterwards, but for the weights of `ckpt_path`.
            dataloaders: Validation data, or a list or dict of loaders.
            datamodule: A `DataModule` instead of loaders.
            ckpt_path: Load these weights first: a path, `"last"` or `"best"`.
        """
        return self._evaluate("validate", module, dataloaders, datamodule, ckpt_path)

    def test(
        self,
        module: FitModule,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[dict[str, float]]:
        """Runs the test; arguments and result as in `validate`."""
        return self._evaluate("test", module, dataloaders, datamodule, ckpt_path)

    def predict(
        self,
        module: FitModule,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[Any]:
        """Runs `predict_step` on every batch.

        Args:
            module: The module.
            dataloaders: The data, or a list or dict of loaders.
            datamodule: A `DataModule` instead of loaders.
            ckpt_path: Load these weights first: a path, `"last"` or `"best"`.

        Returns:
            What each step returned, as NumPy arrays: one item for each batch, in lists of their own when there are
            several loaders.
        """
        return self._evaluate("predict", module, dataloaders, datamodule, ckpt_path)

    def save_checkpoint(self, path: str | Path, *, weights_only: bool = False, asynchronous: bool = False) -> None:
        """Saves the run as it is now into a directory.

        Args:
            path: The directory; one that exists is replaced once the new one is complete.
            weights_only: Leave out what only training needs.
            asynchronous: Return once everything is copied to the host; `wait_for_checkpoints` waits for the disk.

        Raises:
            CheckpointError: It cannot be written.
        """
        run, how = self._running(), {"weights_only": weights_only, "wait": not asynchronous}
        self._checkpoints.save(path, run, self.history, self._fan_out, config=self._config, **how)

    def wait_for_checkpoints(self) -> None:
        """Waits until all asynchronous saves are on disk.

        Raises:
            CheckpointError: One of them could not be written.
        """
        self._checkpoints.wait()

    def _evaluate(
        self, verb: str, module: FitModule, dataloaders: Any, datamodule: Any, ckpt_path: str | Path | None
    ) -> Any:
        self._check_idle(verb)
        datamodule, dataloaders = as_datamodule(dataloaders, datamodule)
        check_module(module, {"validate": "validation_step", "test": "test_step"}.get(verb), verb)
        kind = {"validate": "val"}.get(verb, verb)
        self._control = Control()
        # The fit's History stays as it was returned.
        self._ledger = Ledger(History(), self._publish, self._fan_out.log_drawing)
        self._ledger.forget_host("eval")
        run = self._start(verb, module, datamodule)
        with self._session(run):
            verbs.find_settings(run, GivenData(verb, dataloaders, datamodule=datamodule), None)
            loaders = find_loaders(kind, dataloaders, datamodule, module)
            if loaders is None:
                raise ConfigurationError(
                    f"Trainer.{verb} has no data. Fix: pass dataloaders=, or a datamodule with {kind}_dataloader()."
                )
            source = self._eval_source(kind, loaders)
            if not any(source.limits):
                return []
            checkpoint = self._checkpoints.open(ckpt_path, run)
            run.build()
            self._checkpoints.restore_weights(checkpoint, run)
            return verbs.predict(run, source) if verb == "predict" else verbs.evaluate(run, verb, source)
