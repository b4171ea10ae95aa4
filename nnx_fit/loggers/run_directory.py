"""The directory of one run: where a logger that writes files puts them, so that no two runs share one by accident.

The directory is chosen without touching the disk; it is created together with the first file.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from nnx_fit.errors import ConfigurationError

_log = logging.getLogger(__name__)


def choose_run_directory(save_dir: str | Path, name: str | None, version: str | int | None) -> tuple[Path, str | None]:
    """Chooses the directory of a run.

    Args:
        save_dir: The run's own directory, or the one under which runs are kept when `name` or `version` is given.
        name: Sub-directory of the experiment; `None` for none.
        version: Sub-directory of this run; an integer `n` means `version_n`. `None` with a `name` is the first
            `version_n` that is not there yet.

    Returns:
        The directory, and the name of the version.
    """
    base = Path(save_dir, name) if name else Path(save_dir)
    if version is None and not name:
        return base, None
    if version is None:
        numbers = [re.fullmatch(r"version_(\d+)", path.name) for path in base.glob("version_*")]
        version = max((int(number[1]) for number in numbers if number), default=-1) + 1
    label = f"version_{version}" if isinstance(version, int) else version
    return base / label, label


def report_if_taken(directory: Path, files: str, logger: str) -> None:
    """Says that a run is about to be recorded where another one is already."""
    if any(directory.glob(files)):
        _log.warning(
            "%s: %s already holds the record of another run; both will be read as one. Choose a directory for each "
            "run, or give the logger a name.",
            logger,
            directory,
        )


def cannot_write(path: Path, logger: str, error: OSError) -> ConfigurationError:
    """The one error for a place that cannot be written to."""
    return ConfigurationError(
        f"{logger} cannot write to {path}: {error.strerror or error}.\n"
        "Nothing that the run logs would be kept. Fix: choose a writable `save_dir` (`default_root_dir` of the Trainer "
        "when the logger is the default one), or pass `logger=False`."
    )
