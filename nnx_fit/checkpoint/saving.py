"""Saving a run and continuing from one: what a checkpoint holds, put together from the parts that own it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnx_fit.callbacks.callback import Callback
from nnx_fit.checkpoint import contents
from nnx_fit.checkpoint.directories import find_checkpoints, load_meta
from nnx_fit.checkpoint.store import CheckpointStore, load_arrays
from nnx_fit.errors import CheckpointError, ConfigurationError
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.metrics.history import History
from nnx_fit.run import Run
from nnx_fit.state.layout import ROLES

logger = logging.getLogger("nnx_fit")

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was found and read.

    Attributes:
        path: Its directory.
        meta: Its plain values.
    """

    path: Path
    meta: dict[str, Any]


LOSS_SCALE = ("scale", "updates since it changed")


class Checkpoints:
    """Saves runs and restores them; one for each Trainer."""

    def __init__(self) -> None:
        self._store = CheckpointStore()

    def save(self, path: str | Path, run: Run, history: History, *, weights_only: bool, wait: bool) -> None:
        """Writes a checkpoint of a run.

        Args:
            path: Directory of the checkpoint.
            run: The run, built.
            history: Its history.
            weights_only: Leave out what only training needs.
            wait: Return when it is on disk; otherwise once it is copied to the host.

        Raises:
            CheckpointError: It cannot be written.
        """
        assert run.live is not None
        arrays = contents.module_arrays(run.live.layout, run.live.collect())
        meta: dict[str, Any] = {
            "weights_only": weights_only or run.train_program is None,
            "module": type(run.module).__qualname__,
            "hparams": dict(run.module.hparams),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
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
            arrays["metrics"] = {"epoch": run.train_program.accumulators}
            meta |= {
                "progress": run.progress.state_dict(),
                "metric_names": [dataclasses.asdict(spec) for spec in run.train_program.table.specs],
                "callbacks": {key: callback.state_dict() for key, callback in keyed(run.callbacks)},
                "loader": _position(run),
                "history": history.state_dict(),
                "ledger": run.ledger.state_dict(),
            }
            if (datamodule := run.trainer.datamodule) is not None and hasattr(datamodule, "state_dict"):
                meta["datamodule"] = datamodule.state_dict()
        meta["user"] = {}
        run.funnel.call("on_save_checkpoint", meta["user"])
        self._store.save(Path(path), arrays, meta, asynchronous=not wait)

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._store.wait()

    def open(self, ckpt_path: str | Path | None, trainer: Any) -> Loaded | None:
        """Finds and reads the checkpoint that `ckpt_path` means; `None` when there is none to start from.

        Raises:
            CheckpointError: It does not exist or is damaged.
            ConfigurationError: `"best"` without a monitored checkpoint callback.
        """
        if ckpt_path is None:
            return None
        self.wait()
        path = self._find(str(ckpt_path), trainer)
        return None if path is None else Loaded(path, load_meta(path))

    def _find(self, ckpt_path: str, trainer: Any) -> Path | None:
        callback = trainer.checkpoint_callback
        if ckpt_path == "best":
            if callback is None or callback.monitor is None:
                raise ConfigurationError(
                    'ckpt_path="best": no ModelCheckpoint with a monitor decides which checkpoint is best.\n'
                    'Fix: add ModelCheckpoint(monitor=...), or use ckpt_path="last".'
                )
            if not callback.best_model_path:
                raise CheckpointError('ckpt_path="best": no checkpoint was saved yet. Fix: fit first, or give a path.')
            return Path(callback.best_model_path)
        if ckpt_path != "last":
            return Path(ckpt_path)
        if callback is None:
            raise ConfigurationError('ckpt_path="last" needs a ModelCheckpoint. Fix: add one, or give a path.')
        found = find_checkpoints(callback.directory(trainer))
        if not found:
            logger.warning(
                'ckpt_path="last": there is no checkpoint in %s; starting fresh.', callback.directory(trainer)
            )
            return None
        return found[0]

    def restore_host(self, loaded: Loaded | None, run: Run, loggers: FanOut, history: History) -> None:
        """Gives progress, callbacks, data module and history back what a checkpoint saved of them.

        Raises:
            CheckpointError: The checkpoint holds weights only.
        """
        if loaded is None:
            return
        meta = loaded.meta
        if "progress" not in meta:
            raise CheckpointError(
                f"The checkpoint {loaded.path} holds weights only, so training cannot continue from it.\n"
                "Fix: use one saved without save_weights_only."
            )
        run.progress.load_state_dict(meta["progress"])
        history.load_state_dict(meta["history"])
        run.ledger.load_state_dict(meta["ledger"])
        for key, callback in keyed(run.callbacks):
            if key in meta["callbacks"]:
                callback.load_state_dict(meta["callbacks"][key])
        if "datamodule" in meta and hasattr(run.trainer.datamodule, "load_state_dict"):
            run.trainer.datamodule.load_state_dict(meta["datamodule"])
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
        program = run.train_program
        saved = load_arrays(loaded.path)
        arrays = contents.restore_module(loaded.path, run.live.layout, saved)
        opt_state = contents.restore_optimizer(loaded.path, program.optimizer_state, saved["optimizer"])
        window = contents.restore_window(loaded.path, run.live.layout, saved.get("window"))
        run.live.replace(arrays)
        program.set_optimizer_state(opt_state)
        program.restore_metrics(loaded.meta["metric_names"], np.asarray(saved["metrics"]["epoch"]))
        program.set_window(window)
        if program.loss_scale and "loss_scale" in saved:
            program.set_loss_scale([saved["loss_scale"][name] for name in LOSS_SCALE])
        _restore_callbacks(saved, run)
        return loaded.meta["loader"]

    def restore_weights(self, loaded: Loaded | None, run: Run) -> None:
        """Gives a module, and callbacks that have some, their saved arrays, and nothing else."""
        if loaded is None:
            return
        assert run.live is not None
        wanted = {_group(key) for key, _ in keyed(run.callbacks)}
        own = [group for key in loaded.meta.get("callback_arrays", ()) if (group := _group(key)) in wanted]
        saved = load_arrays(loaded.path, [*ROLES, *own])
        run.live.replace(contents.restore_module(loaded.path, run.live.layout, saved))
        _restore_callbacks(saved, run)


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


def keyed(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Each callback with the name its state is kept under: its class, numbered where there are several."""
    counts: dict[str, int] = {}
    named = []
    for callback in callbacks:
        name = type(callback).__qualname__
        counts[name] = counts.get(name, 0) + 1
        named.append((name if counts[name] == 1 else f"{name}#{counts[name]}", callback))
    return named
