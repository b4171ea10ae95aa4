"""The directory of a run: whose it is, what is recorded in it, and when it is taken away again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from nnx_fit.checkpoint.checksums import write_at_once
from nnx_fit.cli import project, record_files
from nnx_fit.cli.overrides import key_of
from nnx_fit.cli.saved_run import record
from nnx_fit.errors import ConfigurationError

LOG_FILE = "run.log"

_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "resume")


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


def write_record(run_dir: Path, cfg: DictConfig, hydra_cfg: DictConfig, *, resumed: bool) -> Path:
    """Writes the resolved config, the overrides and Hydra's settings; a continued run keeps its first record.

    Args:
        run_dir: The run directory.
        cfg: The job's config, with interpolations.
        hydra_cfg: Hydra's own config.
        resumed: Whether the run continues one that was there.

    Returns:
        The folder of this start's record.
    """
    folder = record(run_dir).parent
    if resumed and record(run_dir).is_file():
        number = 1
        while (folder / f"resumed-{number}").exists():
            number += 1
        folder = folder / f"resumed-{number}"
        folder.mkdir()
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    write_at_once(folder / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_cfg})))
    write_at_once(folder / "overrides.yaml", OmegaConf.to_yaml(hydra_cfg.overrides.task))
    # Last: a process that is killed here leaves no record rather than half of one.
    write_at_once(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
    return folder


def started_with(run_dir: Path) -> list[str]:
    """The overrides of the first start, or none where there is no record of them."""
    file = record(run_dir).with_name("overrides.yaml")
    return [str(word) for word in record_files.read_yaml(file, ListConfig)] if file.is_file() else []


def check_same_job(run_dir: Path, overrides: Sequence[str]) -> None:
    """Refuses to continue a sweep's job as another one: its number is all that they have in common.

    Args:
        run_dir: The directory of the job that was.
        overrides: What the job that is about to start sets.

    Raises:
        ConfigurationError: One of its settings has another value, and does not just say how long to train.
    """
    earlier = {key_of(word): word for word in started_with(run_dir)}
    for word in overrides:
        key = key_of(word)
        if key in earlier and earlier[key] != word and key not in _LENGTHS:
            raise ConfigurationError(
                f"{shown_path(run_dir)} was started with {earlier[key]}, and job {run_dir.name} of this sweep has "
                f"{word}.\nA sweep is continued with the same values in the same order; new ones come last."
            )


def discard_record(folder: Path) -> None:
    """Takes back the record of a start that continued nothing; that of the first start stays."""
    if folder.name.startswith("resumed-"):
        shutil.rmtree(folder, ignore_errors=True)


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
    """A path as one would type it where the command was given."""
    here = project.shell_directory()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
