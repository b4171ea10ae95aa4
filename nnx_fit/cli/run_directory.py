"""The directory of a run: whose it is, what is recorded in it, and when it is taken away again."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nnx_fit.cli.saved_run import record
from nnx_fit.errors import ConfigurationError

LOG_FILE = "run.log"


def claim(run_dir: Path, *, resume: bool) -> bool:
    """Takes a run directory for this run; of two that try at the same time, one succeeds.

    Args:
        run_dir: The directory, which Hydra has created or found.
        resume: Whether a run that is already there is to be continued.

    Returns:
        Whether a run was there.

    Raises:
        ConfigurationError: A run, or anything else, is there and is not to be continued.
    """
    if not is_occupied(run_dir):
        try:
            record(run_dir).parent.mkdir()
            return False
        except FileExistsError:
            pass  # another process was faster, so the directory is taken after all
    if resume:
        record(run_dir).parent.mkdir(exist_ok=True)
        return True
    raise ConfigurationError(
        f"name={run_dir.name}: {shown_path(run_dir)} exists.\n"
        "Choose another name, continue that run with resume=auto, or remove the directory."
    )


def is_occupied(run_dir: Path) -> bool:
    """Whether a directory holds anything of a run but a log that was just opened."""
    return any(entry.name != LOG_FILE for entry in run_dir.iterdir())


def write_record(run_dir: Path, cfg: DictConfig, hydra_cfg: DictConfig, *, resumed: bool) -> None:
    """Writes the resolved config, the overrides and Hydra's settings; a continued run keeps its first record.

    Args:
        run_dir: The run directory.
        cfg: The job's config, with interpolations.
        hydra_cfg: Hydra's own config.
        resumed: Whether the run continues one that was there.
    """
    folder = record(run_dir).parent
    if resumed and record(run_dir).is_file():
        number = 1 + sum(1 for _ in folder.glob("resumed-*"))
        folder = folder / f"resumed-{number}"
        folder.mkdir()
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": hydra_cfg}), folder / "hydra.yaml")
    OmegaConf.save(hydra_cfg.overrides.task, folder / "overrides.yaml")


def discard_if_empty(run_dir: Path) -> None:
    """Removes the directory of a run that was refused, unless it holds more than its record and its log."""
    if not run_dir.is_dir() or {entry.name for entry in run_dir.iterdir()} - {LOG_FILE, record(run_dir).parent.name}:
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == run_dir:
            handler.close()
    shutil.rmtree(run_dir)
    for parent in run_dir.parents[:2]:  # the day and outputs/, where this was their only run
        if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()) or any(parent.iterdir()):
            return
        parent.rmdir()


def shown_path(path: Path) -> str:
    """A path as one would type it here."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
