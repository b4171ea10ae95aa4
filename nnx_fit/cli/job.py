"""The four things that `nnx-fit` does, as functions of a composed config.

Hydra runs one of them, once or for each job of a sweep, maybe in a process of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nnx_fit import configs
from nnx_fit.cli import objects, project, report, run_directory
from nnx_fit.cli.checks import check_config
from nnx_fit.errors import NnxFitError

# A launcher's worker process starts from this module alone, and composes its config with these.
configs.register()

_record = logging.getLogger("nnx_fit.record")


def fit(cfg: DictConfig) -> float | None:
    """Trains, then tests the best checkpoint.

    Returns:
        The monitored metric, for a sweeper to optimise: of the best checkpoint where that is what is monitored.
    """
    return _run("fit", cfg)


def validate(cfg: DictConfig) -> float | None:
    """Validates a checkpoint."""
    return _run("validate", cfg)


def test(cfg: DictConfig) -> float | None:
    """Tests a checkpoint."""
    return _run("test", cfg)


def predict(cfg: DictConfig) -> float | None:
    """Writes the predictions of a checkpoint to `<run>/predictions/`."""
    return _run("predict", cfg)


TASKS = {"fit": fit, "validate": validate, "test": test, "predict": predict}


def _run(command: str, cfg: DictConfig) -> float | None:
    hydra_cfg: Any = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    project.importable(Path(hydra_cfg.runtime.cwd))
    resumed = True  # until the directory is known to be this run's own, it is not this run's to remove
    try:
        if not run_directory.is_occupied(run_dir):
            resumed = False
        check_config(cfg, command)
        resumed = run_directory.claim(run_dir, resume=cfg.get("resume") == "auto")
        run_directory.write_record(run_dir, cfg, hydra_cfg, resumed=resumed)
        with _ended_at_once():
            parts = objects.build(cfg, list(hydra_cfg.overrides.task), run_dir)
        tensorboard = any(type(logger).__name__ == "TensorBoardLogger" for logger in parts.trainer.loggers)
        report.announce(run_dir, tensorboard=tensorboard)
        if command == "fit":
            return _fit(cfg, parts, ckpt_path="last" if resumed else cfg.get("ckpt_path"))
        return _evaluate(command, cfg, parts, run_dir)
    except NnxFitError as error:
        _record.error("%s: %s", type(error).__name__, error)
        if not resumed:
            run_directory.discard_if_empty(run_dir)
        raise
    except Exception:
        _record.exception("The run failed.")
        raise


@contextmanager
def _ended_at_once() -> Iterator[None]:
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


def _fit(cfg: DictConfig, parts: objects.Objects, ckpt_path: str | None) -> float | None:
    trainer = parts.trainer
    trainer.texts["config"] = f"```yaml\n{OmegaConf.to_yaml(cfg, resolve=True)}```"
    trainer.fit(parts.model, datamodule=parts.data, ckpt_path=ckpt_path)
    metrics = dict(trainer.callback_metrics)
    checkpoints = trainer.checkpoint_callback
    objective = _objective(cfg.get("monitor"), checkpoints, metrics)
    if cfg.get("test_after_fit", True) and _can_test(parts):
        for result in trainer.test(parts.model, datamodule=parts.data, ckpt_path=_tested_checkpoint(checkpoints)):
            metrics.update(result)
    report.final_metrics(metrics)
    report.best_checkpoint(checkpoints)
    return objective


def _evaluate(command: str, cfg: DictConfig, parts: objects.Objects, run_dir: Path) -> float | None:
    run = getattr(parts.trainer, command)
    results = run(parts.model, datamodule=parts.data, ckpt_path=cfg.ckpt_path)
    if command == "predict":
        by_loader = results if len(parts.trainer.num_predict_batches) > 1 else [results]
        for file in report.save_predictions(by_loader, run_dir / "predictions"):
            report.log.info("Predictions:   %s", run_directory.shown_path(file))
        return None
    metrics = {name: value for result in results for name, value in result.items()}
    report.final_metrics(metrics)
    return metrics.get(str(cfg.get("monitor")))


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
