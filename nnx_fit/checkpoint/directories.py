"""Checkpoint directories: which are complete, how one takes the place of another, and their plain values.

Everything here is files and names; it is safe against being killed between any two of its steps. The arrays inside
are read and written by `store.py`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from nnx_fit.errors import CheckpointError

FORMAT = 1
META_FILE = Path("meta", "meta.json")
_COMPLETE = "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"
# While a checkpoint takes the place of another, both exist under names of their own, each of them complete.
_NEXT, _PREVIOUS = ".nnx-fit-next", ".nnx-fit-previous"

_log = logging.getLogger(__name__)


def is_complete(path: str | Path) -> bool:
    """Whether a directory is a checkpoint that was written to its end."""
    path = Path(path)
    return _TEMPORARY not in path.name and (path / _COMPLETE).is_file() and (path / META_FILE).is_file()


def load_meta(path: str | Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: There is no complete, readable checkpoint at `path`.
    """
    return read_document(Path(path))["meta"]


def find_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in a directory, the one that got furthest first (by `global_step`, then by age)."""
    directory = Path(directory)
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_complete(path):
            try:
                step = load_meta(path).get("global_step", -1)
            except CheckpointError as error:
                _log.warning("%s It is passed over.", error)
                continue
            found.append((step, (path / _COMPLETE).stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found, reverse=True)]


def check_writable(directory: str | Path) -> None:
    """Refuses a directory in which no checkpoint could be saved, without creating it.

    Raises:
        CheckpointError: Naming what is in the way.
    """
    place = Path(os.path.abspath(directory))
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is a file" if not place.is_dir() else "is not writable"
        raise CheckpointError(
            f"Checkpoints cannot be saved in {directory}: {place} {why}.\n"
            "The run would end without anything to continue from. Fix: pass ModelCheckpoint(dirpath=...) or "
            "Trainer(default_root_dir=...) that can be written, or Trainer(enable_checkpointing=False)."
        )


def delete_checkpoint(path: str | Path) -> None:
    """Deletes a checkpoint. Killed in the middle, it leaves what no longer counts as one."""
    path = Path(path)
    (path / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def discard_unfinished(target: Path) -> None:
    """Frees the disk of what a failed save had written so far."""
    shutil.rmtree(target.with_name(target.name + _TEMPORARY), ignore_errors=True)


def settle(path: Path) -> Path:
    """Ends what a killed process left half done around `path`; says where the next checkpoint is to be written."""
    following = path.with_name(path.name + _NEXT)
    previous = path.with_name(path.name + _PREVIOUS)
    if is_complete(following):
        take_place(following, path)
    elif previous.exists() and not path.exists():
        previous.rename(path)
    for leftover in (following, previous):
        if leftover.exists():
            delete_checkpoint(leftover)
    ours = is_complete(path) or any((path / part).exists() for part in ("arrays", META_FILE.parent))
    if path.exists() and not ours and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is no checkpoint, so nothing was written over it.\nFix: choose another path."
        )
    return following if path.exists() else path


def take_place(target: Path, path: Path) -> None:
    """Puts a complete checkpoint where another one is; at every moment a complete one exists."""
    previous = path.with_name(path.name + _PREVIOUS)
    if path.exists():
        path.rename(previous)
    target.rename(path)
    if previous.exists():
        delete_checkpoint(previous)


def read_document(path: Path) -> dict[str, Any]:
    """Everything a checkpoint holds but its arrays: the plain values and the index of the arrays.

    Raises:
        CheckpointError: There is no complete, readable checkpoint at `path`.
    """
    if not is_complete(path):
        raise CheckpointError(_why_incomplete(path))
    try:
        document = json.loads((path / META_FILE).read_text())
        version, _, _ = (document[key] for key in ("format", "meta", "index"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
    if version > FORMAT:
        raise CheckpointError(
            f"The checkpoint {path} has format {version}; this nnx_fit reads up to {FORMAT}. Fix: update nnx_fit."
        )
    return document


def _why_incomplete(path: Path) -> str:
    near = path if path.is_dir() else path.parent
    others = [other.name for other in find_checkpoints(near)]
    hint = f"Fix: use one of the complete checkpoints in {near}: {', '.join(others[:5])}." if others else (
        "Fix: pass the path of a checkpoint directory, for example RUN_DIR/checkpoints/last."
    )  # fmt: skip
    if not path.exists():
        return f"There is no checkpoint at {path}.\n{hint}"
    if not path.is_dir():
        return f"{path} is a file; a checkpoint is a directory.\n{hint}"
    if (path / META_FILE).exists() or _TEMPORARY in path.name or (path / "arrays").exists():
        return f"The checkpoint {path} is incomplete: the process that wrote it ended before it was done.\n{hint}"
    return f"{path} is not a checkpoint of nnx_fit.\n{hint}"


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a complete checkpoint whose files cannot be read."""
    return CheckpointError(
        f"The checkpoint {path} is damaged and cannot be read ({type(error).__name__}: {_first_line(error)}).\n"
        "Fix: use another one in the same directory."
    )


def not_written(path: Path, error: Exception) -> CheckpointError:
    """The error for a save that failed."""
    return CheckpointError(
        f"The checkpoint {path} could not be written ({type(error).__name__}: {_first_line(error)}).\n"
        "Nothing was left under that name but what was there before. Fix: check that the disk has space and that the "
        "directory is writable."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
