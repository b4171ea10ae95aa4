"""How the training of a run ended, kept beside the config it was started with.

A start that finds the outcome of one with the same settings has nothing to train: jobs that a scheduler starts again
and again come to an end, also where it was early stopping that ended the run. One that raises `trainer.max_epochs`, or
changes anything else, trains on from there; what early stopping has decided stands until its own settings change.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nnx_fit.checkpoint.checksums import write_at_once
from nnx_fit.cli import record_files
from nnx_fit.cli.saved_run import latest_record

_log = logging.getLogger("nnx_fit")

_FILE = "outcome.json"
# What may differ between two starts that ask for the same training.
_ASIDE = ("name", "resume", "ckpt_path", "test_after_fit")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the training of a run ended.

    Attributes:
        reason: Why, in words.
        global_step: Where.
        objective: The monitored metric, for a sweeper.
        metrics: The metrics that the run ended with.
        tested: Whether the test that follows is done, if there is one.
    """

    reason: str
    global_step: int
    objective: float | None
    metrics: dict[str, float]
    tested: bool


def save(outcome: Outcome, folder: Path) -> None:
    """Keeps an outcome in the record of the start that led to it; one that is there is replaced in one go."""
    write_at_once(folder / _FILE, json.dumps(dataclasses.asdict(outcome), indent=1))


def of_same_settings(run_dir: Path, cfg: DictConfig) -> Outcome | None:
    """The outcome of the last start, if there is one and it had the settings of the one that is about to be made.

    One that is damaged is as good as none: what it says is found out again from the checkpoints.
    """
    file = latest_record(run_dir)
    if not file.with_name(_FILE).is_file() or not file.is_file():
        return None
    if _settings(record_files.read_yaml(file)) != _settings(cfg):
        return None
    try:
        return Outcome(**json.loads(file.with_name(_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s is damaged and not looked at (%s).", file.with_name(_FILE), str(error) or type(error).__name__)
        return None


def reason_to_end(trainer: Any) -> str | None:
    """Why a fit ended, in words; `None` where the time given to this process was over, after which another has its own.

    Args:
        trainer: The Trainer, after its fit.
    """
    from nnx_fit.loops.progress import TIME_IS_UP

    if trainer.stop_reason == TIME_IS_UP:
        return None
    if trainer.options.epoch_limit <= trainer.current_epoch:
        return f"trainer.max_epochs={trainer.max_epochs} is reached"
    if trainer.options.step_limit <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} is reached"
    return trainer.stop_reason or "it was stopped"


def _settings(cfg: Any) -> dict[str, Any]:
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return {name: value for name, value in resolved.items() if name not in _ASIDE and value is not None}
