"""Which checkpoint a `ckpt_path` means, and whether it can be used: all of this before anything of a run is touched."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnx_fit.checkpoint.directories import check_files, is_complete, load_meta, newest_undamaged
from nnx_fit.checkpoint.store import load_arrays
from nnx_fit.errors import CheckpointError, ConfigurationError

logger = logging.getLogger("nnx_fit")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was found, compared with its checksums, and read.

    Attributes:
        path: Its directory.
        meta: Its plain values.
        arrays: Groups of arrays by name, on the host. Emptied once they are where they belong.
    """

    path: Path
    meta: dict[str, Any]
    arrays: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def find(ckpt_path: str | Path, trainer: Any) -> Path | None:
    """The checkpoint that a `ckpt_path` means; `None` when there is none to start from.

    With `"last"` a damaged checkpoint is named in a warning, and the one before it is taken.

    Raises:
        CheckpointError: It does not exist, or is damaged: names the files and what may be used instead.
        ConfigurationError: No `ModelCheckpoint` says which one it is.
    """
    path = str(ckpt_path)
    if path == "last":
        return _last(trainer)
    found = _best(trainer) if path == "best" else Path(path)
    check_files(found)
    return found


def read(path: Path, groups: Sequence[str], *, and_callbacks: Sequence[str] = ()) -> Loaded:
    """Reads a checkpoint whose files were compared with their checksums.

    Args:
        path: Its directory.
        groups: The groups of arrays to read; none stands for all.
        and_callbacks: The groups of callbacks to read as well, where it has them.
    """
    meta = load_meta(path)
    own = [f"callback {key}" for key in meta.get("callback_arrays", ())]
    wanted = [*groups, *(group for group in own if group in and_callbacks)] if groups else None
    return Loaded(path, meta, load_arrays(path, wanted, checked=True))


def _best(trainer: Any) -> Path:
    callback = trainer.checkpoint_callback
    if callback is None or callback.monitor is None:
        raise ConfigurationError(
            'ckpt_path="best": no ModelCheckpoint with a monitor decides which checkpoint is best.\n'
            'Fix: add ModelCheckpoint(monitor=...), or use ckpt_path="last".'
        )
    if not callback.best_model_path:
        raise CheckpointError('ckpt_path="best": no checkpoint was saved yet. Fix: fit first, or give a path.')
    return Path(callback.best_model_path)


def _last(trainer: Any) -> Path | None:
    callback = trainer.checkpoint_callback
    if callback is None:
        raise ConfigurationError('ckpt_path="last" needs a ModelCheckpoint. Fix: add one, or give a path.')
    directory = callback.directory(trainer)
    found = newest_undamaged(directory)
    if found is None:
        some = directory.is_dir() and any(map(is_complete, directory.iterdir()))
        which = "no checkpoint that is not damaged" if some else "no checkpoint"
        logger.warning('ckpt_path="last": there is %s in %s; starting fresh.', which, directory)
    return found
