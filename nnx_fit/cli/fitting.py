"""A fit and the test after it: all of it, or what is left of it where the run was begun by an earlier process.

What may be left is training, only the test, or nothing.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nnx_fit import configs
from nnx_fit.cli import objects, outcome, report, run_directory
from nnx_fit.cli.saved_run import latest_record
from nnx_fit.errors import CheckpointError

_VERSIONED = (configs.TensorBoardLoggerConfig, configs.CSVLoggerConfig)


def fit(cfg: DictConfig, hydra_cfg: Any, run_dir: Path, *, resumed: bool, from_checkpoint: bool) -> float | None:
    """Trains, then tests the best checkpoint.

    Args:
        cfg: A config that passed `check_config`.
        hydra_cfg: Hydra's own config.
        run_dir: The run's directory, which is this process's alone.
        resumed: Whether a run was there, which is to be continued.
        from_checkpoint: Whether one without a checkpoint is an error, and not begun anew.

    Returns:
        The monitored metric: of the best checkpoint where that is what is monitored.

    Raises:
        CheckpointError: There is no checkpoint to continue from, or it is another model's.
    """
    ended = outcome.of_same_settings(run_dir, cfg) if resumed else None
    if ended is not None:
        report.nothing_left(run_dir, ended.reason, ended.global_step)
        if ended.tested or not cfg.get("test_after_fit", True):
            report.final_metrics(ended.metrics)
            return ended.objective
        record = latest_record(run_dir).parent
    else:
        record = run_directory.write_record(run_dir, cfg, hydra_cfg, resumed=resumed)
    trainer, start = None, 0
    try:
        with ended_at_once():
            built = _in_place(_until(cfg, ended), run_dir) if resumed else cfg
            parts = objects.build(built, list(hydra_cfg.overrides.task), run_dir)
        trainer = parts.trainer
        trainer.texts["config"] = f"```yaml\n{OmegaConf.to_yaml(cfg, resolve=True)}```"
        report.announce(run_dir, trainer)
        ckpt_path = cfg.get("ckpt_path")
        if resumed:
            found, start = _newest_checkpoint(trainer, run_dir, required=from_checkpoint)
            ckpt_path = found or ckpt_path or "last"
        trainer.fit(parts.model, datamodule=parts.data, ckpt_path=ckpt_path)
        reason = outcome.reason_to_end(trainer)
        if resumed and ended is None and reason is not None and trainer.global_step == start:
            report.nothing_left(run_dir, reason, start)
        return _conclude(cfg, parts, record, ended)
    except Exception:
        if ended is None and (trainer is None or trainer.global_step <= start):
            run_directory.discard_record(record)  # so that it is not what the run is continued with next time
        raise


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process at once while the objects are built.

    Raised inside the imports of a large library it would come out as any error; nothing is under way yet to be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(130)

    earlier = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _until(cfg: DictConfig, ended: outcome.Outcome | None) -> DictConfig:
    """The config of a run that only its test is left of: it gets as far as it got, whatever ended it there."""
    if ended is None or not ended.global_step:
        return cfg
    bounded = copy.deepcopy(cfg)
    OmegaConf.update(bounded, "trainer", {"max_steps": ended.global_step, "min_steps": None, "min_epochs": None})
    return bounded


def _in_place(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """The config of a run that goes on in its own files: a logger with a `name` would choose a new version of it."""
    placed = copy.deepcopy(cfg)
    OmegaConf.set_struct(placed, False)
    for entry in filter(None, (placed.get("logger") or {}).values()):
        if entry.get("name") and entry.get("version") is None and _schema(entry) in _VERSIONED:
            folder = Path(entry.save_dir, entry.name)
            numbers = [re.fullmatch(r"version_(\d+)", path.name) for path in folder.glob("version_*")]
            if folder.is_relative_to(run_dir):
                entry.version = max((int(number[1]) for number in numbers if number), default=None)
    return placed


def _schema(entry: DictConfig) -> type | None:
    return configs.schema_of_target(entry.get("_target_"))


def _newest_checkpoint(trainer: Any, run_dir: Path, *, required: bool) -> tuple[Path | None, int]:
    """The newest undamaged checkpoint that a run left, and its `global_step`.

    Without any, and where none is required, it starts as it did the first time. But it does not start over what it left
    as long as there are damaged ones, of which the user may have a copy.

    Raises:
        CheckpointError: There are damaged ones only, or none where one is required.
    """
    from nnx_fit.checkpoint.directories import is_complete, load_meta, newest_undamaged

    callback = trainer.checkpoint_callback
    folder = callback.directory(trainer) if callback is not None else run_dir
    found = newest_undamaged(folder)
    if found is not None:
        return found, load_meta(found)["global_step"]
    shown, words = run_directory.shown_path(folder), shlex.join(["nnx-fit", *run_directory.started_with(run_dir)])
    damaged = sorted(path.name for path in folder.iterdir() if is_complete(path)) if folder.is_dir() else []
    if damaged:
        anew = f"start it anew: {words}" if required else f"remove {shown}: the same command then starts the run anew"
        raise CheckpointError(
            f"{shown} holds no checkpoint to continue from, since each of them is damaged: {', '.join(damaged)}.\n"
            f"Nothing was changed. Fix: bring their files back from a copy, or {anew}"
        )
    if required:
        raise CheckpointError(
            f"{shown} holds no complete checkpoint to continue from: the run was ended before its first one, or keeps "
            f"none.\nStart it anew: {words}"
        )
    return None, 0


def _conclude(cfg: DictConfig, parts: objects.Objects, record: Path, ended: outcome.Outcome | None) -> float | None:
    """Tests, reports, and keeps how the run ended."""
    trainer = parts.trainer
    metrics, checkpoints = dict(trainer.callback_metrics), trainer.checkpoint_callback
    objective = ended.objective if ended is not None else _objective(cfg.get("monitor"), checkpoints, metrics)
    reason = ended.reason if ended is not None else outcome.reason_to_end(trainer)
    step, can_test = trainer.global_step, _can_test(parts)

    def keep(tested: bool) -> None:
        if reason is not None:
            outcome.save(outcome.Outcome(reason, step, objective, metrics, tested), record)

    keep(tested=not can_test)
    if can_test and cfg.get("test_after_fit", True):
        for result in trainer.test(parts.model, datamodule=parts.data, ckpt_path=_tested_checkpoint(checkpoints)):
            metrics.update(result)
        keep(tested=True)
    report.final_metrics(metrics)
    report.best_checkpoint(checkpoints)
    return objective


def _objective(monitor: str | None, checkpoints: Any, metrics: dict[str, float]) -> float | None:
    if monitor is None:
        return None
    score = getattr(checkpoints, "best_model_score", None)
    if score is not None and getattr(checkpoints, "monitor", None) == monitor:
        return float(score)
    return float(metrics[monitor]) if monitor in metrics else None


def _can_test(parts: objects.Objects) -> bool:
    from nnx_fit.data.datamodule import has_loader
    from nnx_fit.module import FitModule

    return has_loader(parts.data, "test") and type(parts.model).test_step is not FitModule.test_step


def _tested_checkpoint(checkpoints: Any) -> str | None:
    """The best checkpoint, the last without a monitor; `None`, the weights as they are, where none was written."""
    if getattr(checkpoints, "best_model_path", None) and getattr(checkpoints, "monitor", None):
        return "best"
    return "last" if getattr(checkpoints, "last_model_path", None) else None
