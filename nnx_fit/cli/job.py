"""The things that `nnx-fit` does, as functions of a composed config.

Hydra runs one of them, once or for each job of a sweep, maybe in a process of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nnx_fit import configs
from nnx_fit.cli import fitting, objects, project, report, run_directory, run_lock
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


def resume(cfg: DictConfig) -> float | None:
    """Continues a run in its own directory, to the end that `fit` would have had.

    Returns:
        As `fit` does.
    """
    return _run("resume", cfg)


def validate(cfg: DictConfig) -> float | None:
    """Validates a checkpoint."""
    return _run("validate", cfg)


def test(cfg: DictConfig) -> float | None:
    """Tests a checkpoint."""
    return _run("test", cfg)


def predict(cfg: DictConfig) -> float | None:
    """Writes the predictions of a checkpoint to `<run>/predictions/`."""
    return _run("predict", cfg)


TASKS = {"fit": fit, "resume": resume, "validate": validate, "test": test, "predict": predict}


def _run(command: str, cfg: DictConfig) -> float | None:
    hydra_cfg: Any = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    project.importable(Path(hydra_cfg.runtime.cwd))
    overrides = list(hydra_cfg.overrides.task)
    resumed = True  # until the directory is known to be this run's own, it is not this run's to remove
    try:
        if not run_directory.is_occupied(run_dir):
            resumed = False
        check_config(cfg, "fit" if command == "resume" else command)
        resumed = run_directory.claim(run_dir, resume=command == "resume" or cfg.get("resume") == "auto")
        with run_lock.held(run_dir):
            if resumed and hydra_cfg.mode == RunMode.MULTIRUN:
                run_directory.check_same_job(run_dir, overrides)
            if command in ("fit", "resume"):
                return fitting.fit(cfg, hydra_cfg, run_dir, resumed=resumed, from_checkpoint=command == "resume")
            run_directory.write_record(run_dir, cfg, hydra_cfg, resumed=resumed)
            with fitting.ended_at_once():
                parts = objects.build(cfg, overrides, run_dir)
            return _evaluate(command, cfg, parts, run_dir)
    except NnxFitError as error:
        _record.error("%s: %s", type(error).__name__, error)
        if not resumed:
            run_directory.discard_if_empty(run_dir)
        raise
    except Exception:
        _record.exception("The run failed.")
        raise


def _evaluate(command: str, cfg: DictConfig, parts: objects.Objects, run_dir: Path) -> float | None:
    report.announce(run_dir, parts.trainer)
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
