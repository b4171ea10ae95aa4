"""Saving a run and continuing from one: what a checkpoint holds, put together from the parts that own it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_fit import __version__
from nnx_fit.callbacks.callback import keyed
from nnx_fit.callbacks.model_checkpoint import ModelCheckpoint
from nnx_fit.checkpoint import contents, fitting
from nnx_fit.checkpoint.construction import recorded
from nnx_fit.checkpoint.directories import begin_life, next_life
from nnx_fit.checkpoint.finding import Loaded, find, read
from nnx_fit.checkpoint.fitting import Before
from nnx_fit.checkpoint.store import CheckpointStore
from nnx_fit.errors import CheckpointError
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loops.progress import TIME_IS_UP
from nnx_fit.metrics.history import History
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.run import Run
from nnx_fit.state.layout import ROLES

logger = logging.getLogger("nnx_fit")

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


LOSS_SCALE = ("scale", "updates since it changed")


class Checkpoints:
    """Saves runs and restores them; one for each Trainer."""

    def __init__(self) -> None:
        self._store = CheckpointStore()
        self._before = Before()
        self._life = 1

    def save(
        self,
        path: str | Path,
        run: Run,
        history: History,
        loggers: FanOut,
        *,
        weights_only: bool,
        wait: bool,
        config: str = "",
    ) -> None:
        """Writes a checkpoint of a run.

        Args:
            path: Directory of the checkpoint.
            run: The run, built.
            history: Its history.
            loggers: Its loggers.
            weights_only: Leave out what only training needs.
            wait: Return when it is on disk; otherwise once it is copied to the host.
            config: The run's configuration, to be read by people.

        Raises:
            CheckpointError: It cannot be written.
        """
        assert run.live is not None
        arrays = contents.module_arrays(run.live.layout, run.arrays_to_save())
        meta: dict[str, Any] = {
            "weights_only": weights_only or run.train_program is None,
            "module": type(run.module).__qualname__,
            **recorded(run.module.hparams),
            "precision": run.options.precision,
            "versions": versions(),
            "config": config.removeprefix("```yaml\n").removesuffix("```"),
            "life": self._life,
            "global_step": run.progress.global_step,
            "epoch": run.progress.epoch,
        }
        own = {key: found for key, callback in keyed(run.callbacks) if (found := callback.arrays())}
        arrays |= {_group(key): found for key, found in own.items()}
        meta["callback_arrays"] = list(own)
        if not weights_only and run.train_program is not None:
            run.ledger.drain()
            arrays["optimizer"] = contents.optimizer_arrays(run.train_program.optimizer_state)
            if run.train_program.window:
                arrays["window"] = contents.window_arrays(run.live.layout, run.train_program.window)
            if run.train_program.loss_scale:
                arrays["loss_scale"] = dict(zip(LOSS_SCALE, run.train_program.loss_scale, strict=True))
            arrays["metrics"] = run.train_program.accumulators.named()
            meta |= {
                "progress": run.progress.state_dict(),
                "metric_names": run.train_program.table.state_dict(),
                "callbacks": {key: callback.state_dict() for key, callback in keyed(run.callbacks)},
                "loader": _position(run),
                "history": history.state_dict(),
                "ledger": run.ledger.state_dict(),
                "loggers": loggers.state_dict(),
                "stop": _stop_held_back(run),
                "hook": run.funnel.state_dict(),
            }
            if (datamodule := run.trainer.datamodule) is not None and hasattr(datamodule, "state_dict"):
                meta["datamodule"] = datamodule.state_dict()
        meta["user"] = {}
        run.funnel.call("on_save_checkpoint", meta["user"])
        self._store.save(Path(path), arrays, meta, asynchronous=not wait)

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._store.wait()

    def open(self, ckpt_path: str | Path | None, run: Run) -> Loaded | None:
        """Finds and reads the checkpoint that `ckpt_path` means; `None` when there is none to start from.

        Nothing of the run is touched, and what can be known to be in the way of using the checkpoint is an error here.

        Raises:
            CheckpointError: It does not exist, is damaged, is of another module, or holds weights only where a fit is
                to continue.
            ConfigurationError: No `ModelCheckpoint` says which one it is.
        """
        self.wait()
        path = None if ckpt_path is None else find(ckpt_path, run.trainer)
        if run.verb == "fit":
            self._life = next_life([*_places(run), *([] if path is None else [path.parent])])
        if path is None:
            return None
        if run.verb == "fit":
            loaded = read(path, ())
            if "progress" not in loaded.meta:
                raise CheckpointError(
                    f"The checkpoint {path} holds weights only, so training cannot continue from it.\n"
                    "Fix: use one saved without save_weights_only, or start from its weights with "
                    f"{type(run.module).__name__}.load_from_checkpoint(path)."
                )
        else:
            loaded = read(path, ROLES, and_callbacks=[_group(key) for key, _ in keyed(run.callbacks)])
        if fitting.is_settled(run):
            fitting.check_module(loaded, run)
        return loaded

    def restore_position(self, loaded: Loaded | None, run: Run) -> None:
        """Gives progress and data module back what a checkpoint saved of them: what loaders may depend on."""
        if loaded is None:
            return
        self._before = Before()
        self._before.remember(run.progress)
        run.progress.load_state_dict(loaded.meta["progress"])
        if (stop := loaded.meta.get("stop")) is not None:
            run.control.should_stop, run.control.stop_reason = True, stop or None
        datamodule = run.trainer.datamodule
        if "datamodule" in loaded.meta and hasattr(datamodule, "load_state_dict"):
            self._before.remember(datamodule)
            datamodule.load_state_dict(loaded.meta["datamodule"])

    def restore_host(
        self,
        loaded: Loaded | None,
        run: Run,
        loggers: FanOut,
        history: History,
        optimizers: Sequence[BoundOptimizer],
    ) -> None:
        """Gives callbacks, metrics and history back what a checkpoint saved of them.

        Raises:
            CheckpointError: The checkpoint is of other optimizers; nothing was changed.
        """
        if loaded is None:
            return
        if fitting.is_settled(run):
            with self._before.unless_refused():
                fitting.check_optimizers(loaded, run, optimizers)
        meta = loaded.meta
        named = [(key, callback) for key, callback in keyed(run.callbacks) if key in meta["callbacks"]]
        self._before.remember(history, run.ledger, *(callback for _, callback in named))
        history.load_state_dict(meta["history"])
        run.ledger.load_state_dict(meta["ledger"])
        for key, callback in named:
            callback.load_state_dict(meta["callbacks"][key])
        run.funnel.load_state_dict(meta.get("hook"))
        loggers.load_state_dict(meta.get("loggers", {}))
        if any(loaded.path.parent.samefile(place) for place in _places(run) if place.is_dir()):
            begin_life(loaded.path, self._life)
        loggers.continue_from(run.progress.global_step)
        run.funnel.call("on_load_checkpoint", meta.get("user", {}))
        logger.info("Continuing from %s at step %d.", loaded.path, run.progress.global_step)

    def restore_arrays(self, loaded: Loaded | None, run: Run) -> Any:
        """Gives module and optimizer their saved arrays.

        Returns:
            The saved position in the training data, or `None`.

        Raises:
            CheckpointError: The checkpoint is of another module or optimizer; nothing was changed.
        """
        if loaded is None:
            return None
        assert run.live is not None and run.train_program is not None
        program, saved = run.train_program, loaded.arrays
        with self._before.unless_refused():
            arrays = contents.restore_module(loaded.path, run.live.layout, saved)
            opt_state = contents.restore_optimizer(loaded.path, program.optimizer_state, saved["optimizer"])
            window = contents.restore_window(loaded.path, run.live.layout, saved.get("window"))
        run.live.replace(arrays)
        program.set_optimizer_state(opt_state)
        program.restore_metrics(loaded.meta["metric_names"], saved["metrics"])
        program.set_window(window)
        if program.loss_scale and "loss_scale" in saved:
            program.set_loss_scale([saved["loss_scale"][name] for name in LOSS_SCALE])
        _restore_callbacks(saved, run)
        loaded.arrays.clear()
        return loaded.meta["loader"]

    def restore_weights(self, loaded: Loaded | None, run: Run) -> None:
        """Gives a module, and callbacks that have some, their saved arrays, and nothing else."""
        if loaded is None:
            return
        assert run.live is not None
        run.live.replace(contents.restore_module(loaded.path, run.live.layout, loaded.arrays))
        _restore_callbacks(loaded.arrays, run)
        loaded.arrays.clear()


def _places(run: Run) -> list[Path]:
    """Where a run saves by itself."""
    return [each.directory(run.trainer) for each in run.callbacks if isinstance(each, ModelCheckpoint)]


def versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"nnx_fit": __version__, "python": platform.python_version(), **found}


def _group(key: str) -> str:
    """Name of the group of arrays that a callback has in a checkpoint."""
    return f"callback {key}"


def _restore_callbacks(saved: Mapping[str, Mapping[str, Any]], run: Run) -> None:
    for key, callback in keyed(run.callbacks):
        if _group(key) in saved:
            callback.load_arrays(saved[_group(key)])


def _position(run: Run) -> Any:
    """Where the run is in its training data: after the last batch it trained on, which may not be the last it got."""
    if run.batches is None:
        return None
    return run.batches.get_state(run.progress.batch_idx if run.progress.in_epoch else None)


def _stop_held_back(run: Run) -> str | None:
    """Why the run is to stop once `min_epochs` and `min_steps` are reached, or `None`: it is not, or stops already.

    A run that was stopped may be continued beyond that; and where time was up, another process has its own.
    """
    control, progress, options = run.control, run.progress, run.options
    waits = progress.epoch < (options.min_epochs or 0) or progress.global_step < (options.min_steps or 0)
    if not (control.should_stop and waits) or control.stop_reason == TIME_IS_UP:
        return None
    return control.stop_reason or ""
