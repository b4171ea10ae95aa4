"""Checkpoint directories: which are complete, how one takes the place of another, and their plain values.

Everything here is files and names; it is safe against being killed between any two of its steps. The arrays inside
are read and written by `store.py`; whether the files are still what was written is what `checksums.py` knows.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnx_fit.checkpoint import branches, checksums, documents
from nnx_fit.errors import CheckpointError

FORMAT = 1
META_FILE = Path("meta", "meta.json")
_COMPLETE = "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"
# What is being written: Orbax is done with it once the first of these is all that its name ends with.
_WRITING = ".nnx-fit-writing"
# While a checkpoint takes the place of another, both exist under names of their own, each of them complete.
_NEXT, _PREVIOUS = ".nnx-fit-next", ".nnx-fit-previous"

_log = logging.getLogger(__name__)


class _NewerFormatError(CheckpointError):
    """A checkpoint is whole, and not for this version to read."""


def is_complete(path: str | Path) -> bool:
    """Whether a directory is a checkpoint that was written to its end."""
    path = Path(path)
    return not _unfinished(path) and (path / _COMPLETE).is_file() and (path / META_FILE).is_file()


def load_meta(path: str | Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: There is no complete, readable checkpoint at `path`.
    """
    return read_document(Path(path))["meta"]


def find_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in a directory, the newest first.

    That is by the life of the run that saved them, then by `global_step`, then by age: a run that went back to an older
    checkpoint has not got as far as the one before it, and what it saves is newer all the same. No clock decides that.

    Those with damaged plain values are passed over, with a warning; whether the files of the others are as they were
    written is not looked at.
    """
    found = []
    for path, document in _documents(Path(directory)):
        if isinstance(document, CheckpointError):
            _pass_over(document)
        else:
            found.append(path)
    return found


def newest_undamaged(directory: str | Path) -> Path | None:
    """The newest checkpoint in a directory that is as it was written; `None` if there is none.

    Every damaged one that is newer is named in a warning.

    Raises:
        CheckpointError: One of them has a format for a newer version, which an older one is no substitute for.
    """
    for path, document in _documents(Path(directory)):
        if isinstance(document, _NewerFormatError):
            raise document
        if isinstance(document, CheckpointError):
            _pass_over(document)
        elif wrong := _damage(path, document):
            _pass_over(_unusable(path, wrong))
        else:
            return path
    return None


def next_life(places: Iterable[str | Path]) -> int:
    """The number of the life that a run begins which may save in some directories: one more than any there.

    It is kept in each checkpoint, as `life`, and makes those of this life newer than all that are there.
    """
    lives = [0]
    for place in {*map(Path, places)}:
        lives += [_life(found) for _, found in _documents(place) if isinstance(found, dict)]
        lives.append(branches.noted(place)[1])
    return 1 + max(lives)


def begin_life(checkpoint: Path, life: int) -> None:
    """Makes the checkpoint that a life begins with the newest one beside it, until that life has one of its own."""
    newest = next((path for path, found in _documents(checkpoint.parent) if isinstance(found, dict)), checkpoint)
    if not newest.samefile(checkpoint):
        branches.note(checkpoint, life)


def check_files(path: str | Path) -> None:
    """Compares every file of a checkpoint with the checksum it was written with.

    Checkpoints from before there were checksums have none, and pass.

    Raises:
        CheckpointError: There is no complete checkpoint at `path`, or it is damaged: names the files, what is wrong
            with them, and the newest checkpoint beside it that is not.
    """
    path = Path(os.path.abspath(path))
    if wrong := _damage(path, read_document(path)):
        raise damaged(path, wrong)


def _documents(directory: Path) -> Iterator[tuple[Path, dict[str, Any] | CheckpointError]]:
    """Complete checkpoints with their documents, the newest first; unreadable ones before them."""
    found = []
    begun_with, begun = branches.noted(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_complete(path):
            place: tuple[float, float] = (float("inf"), 0.0)
            document: dict[str, Any] | CheckpointError
            try:
                document = _document(path)
                life = max(_life(document), begun if path.name == begun_with else 0)
                place = (life, float(document["meta"].get("global_step", -1)))
            except CheckpointError as error:
                document = error
            with suppress(FileNotFoundError):  # deleted by now, by the process that saves here
                found.append(((*place, (path / _COMPLETE).stat().st_mtime_ns, str(path)), path, document))
    for _, path, document in sorted(found, key=lambda each: each[0], reverse=True):
        yield path, document


def _life(document: Mapping[str, Any]) -> int:
    return document["meta"].get("life", 0)  # those from before lives were counted are older than any


def _damage(path: Path, document: Mapping[str, Any]) -> list[str]:
    return checksums.damage(path, document.get("files", {}))


def _pass_over(error: CheckpointError) -> None:
    _log.warning("%s\nIt is passed over.", error)


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
    """Deletes a checkpoint. Killed in the middle, it leaves what no longer counts as one.

    Of a symbolic link to one, only the link goes.
    """
    path = Path(path)
    if path.is_symlink():
        path.unlink()
        return
    (path / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def discard_unfinished(target: Path) -> None:
    """Frees the disk of what a failed save had written so far."""
    for suffix in (_WRITING + _TEMPORARY, _WRITING, _TEMPORARY):
        shutil.rmtree(target.with_name(target.name + suffix), ignore_errors=True)


def writing_place(target: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return target.with_name(target.name + _WRITING)


def complete(target: Path, document: Mapping[str, Any]) -> None:
    """Ends the writing of a checkpoint: its files are summed up, its document is written, and it gets its name.

    Args:
        target: The name.
        document: Everything it holds but its arrays.
    """
    writing = writing_place(target)
    writing.mkdir(exist_ok=True)  # it is there already if there are arrays
    if not (writing / _COMPLETE).exists():
        (writing / _COMPLETE).write_text("complete\n")
    files = checksums.sums_of(writing)
    (writing / META_FILE.parent).mkdir(exist_ok=True)
    with (writing / META_FILE).open("wb") as file:
        file.write(checksums.sealed({**document, "files": files}))
        file.flush()
        checksums.flushed(file.fileno())
    writing.rename(target)
    branches.forget(target.parent, document["meta"].get("life", 0))


def settle(path: Path) -> Path:
    """Ends what a killed process left half done around `path`; says where the next checkpoint is to be written."""
    following = path.with_name(path.name + _NEXT)
    previous = path.with_name(path.name + _PREVIOUS)
    if is_complete(following):
        take_place(following, path)
    elif _is_there(previous) and not _is_there(path):
        previous.rename(path)
    for leftover in (following, previous):
        if _is_there(leftover):
            delete_checkpoint(leftover)
    for target in (path, following):
        discard_unfinished(target)
    ours = is_complete(path) or any((path / part).exists() for part in ("arrays", META_FILE.parent))
    if path.exists() and not ours and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is no checkpoint, so nothing was written over it.\nFix: choose another path."
        )
    return following if _is_there(path) else path


def take_place(target: Path, path: Path) -> None:
    """Puts a complete checkpoint where another one is; at every moment a complete one exists."""
    previous = path.with_name(path.name + _PREVIOUS)
    if _is_there(path):
        path.rename(previous)
    target.rename(path)
    if _is_there(previous):
        delete_checkpoint(previous)


def _is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a link that leads nowhere."""
    return os.path.lexists(path)


def read_document(path: Path) -> dict[str, Any]:
    """Everything a checkpoint holds but its arrays: the plain values, the index of the arrays, the checksums.

    Raises:
        CheckpointError: There is no complete, readable checkpoint at `path`.
    """
    if not is_complete(path):
        raise CheckpointError(_why_incomplete(path))
    try:
        return _document(path)
    except _NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_instead_of(path)}") from error


def _document(path: Path) -> dict[str, Any]:
    try:
        version, document = documents.read((path / META_FILE).read_bytes())
        if version > FORMAT:
            raise _NewerFormatError(
                f"The checkpoint {path} has format {version}; this nnx_fit reads up to {FORMAT}. Fix: update nnx_fit."
            )
        documents.check(document)
    except OSError as error:
        raise _unusable(path, [f"{META_FILE.as_posix()} cannot be read ({error.strerror})"]) from error
    except ValueError as error:
        raise _unusable(path, [f"{META_FILE.as_posix()} is not what was written ({_first_line(error)})"]) from error
    return document


def _unfinished(path: Path) -> bool:
    return path.name.endswith((_TEMPORARY, _WRITING))


def _why_incomplete(path: Path) -> str:
    hint = _others_near(path) or "Fix: pass the path of a checkpoint directory, for example RUN_DIR/checkpoints/last."
    if not path.exists():
        return f"There is no checkpoint at {path}.\n{hint}"
    if not path.is_dir():
        return f"{path} is a file; a checkpoint is a directory.\n{hint}"
    if (path / META_FILE).exists() or _unfinished(path) or (path / "arrays").exists():
        missing = _COMPLETE if not (path / _COMPLETE).is_file() else META_FILE.as_posix()
        what = "not at its end" if _unfinished(path) else f"without {missing}"
        return (
            f"The checkpoint {path} is incomplete: the process that wrote it ended before it was done, or one that "
            f"deleted it did ({what}).\n{hint}"
        )
    return f"{path} is not a checkpoint of nnx_fit.\n{hint}"


def _others_near(path: Path) -> str:
    for near in (path, path / "checkpoints", path.parent):
        others = [other.name for other, document in _documents(near) if not isinstance(document, CheckpointError)]
        if others:
            return f"Fix: use one of the complete checkpoints in {near}: {', '.join(others[:5])}."
    return ""


def damaged(path: Path, wrong: list[str]) -> CheckpointError:
    """The error for a checkpoint whose files are not what was written, with what may be used instead of it."""
    return CheckpointError(f"{_unusable(path, wrong)}\n{_instead_of(path)}")


def _unusable(path: Path, wrong: list[str]) -> CheckpointError:
    shown = "".join(f"\n    {each}" for each in wrong[:10])
    more = f"\n    ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    return CheckpointError(f"The checkpoint {path} is damaged:{shown}{more}")


def _instead_of(path: Path) -> str:
    for other, document in _documents(path.parent):
        if other.name != path.name and not isinstance(document, CheckpointError) and not _damage(other, document):
            return f"Fix: use {other}, the newest of those beside it that are not damaged."
    return "Fix: bring the files back from a copy; there is no other checkpoint beside it that is not damaged."


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a complete checkpoint whose files cannot be read."""
    return damaged(path, [f"arrays cannot be read ({type(error).__name__}: {_first_line(error)})"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
