"""What is said when a save fails: one clear error, and none of what the libraries below say many times over."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnx_fit.errors import NotWrittenError

# TensorStore gives no error numbers, but the text of the operating system.
_REASONS = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
]


def not_written(path: Path, error: Exception) -> NotWrittenError:
    """The error for a save that failed."""
    reason = why(error)
    return NotWrittenError(
        f"The checkpoint {path} could not be written: {reason}.\n"
        "Nothing was left under that name but what was there before. Fix: check that the disk has space and that the "
        "directory is writable.",
        reason,
    )


def why(error: Exception) -> str:
    """Why a file could not be written, in a line: what the operating system says, where it was asked."""
    said = str(error)
    for reason in _REASONS:
        if reason in said:
            return reason
    line = (said.strip().splitlines() or ["no message"])[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {line}"


def quiet_orbax() -> None:
    """Keeps Orbax's reports out of the run's log: of its progress, and of failures that it raises as well.

    When one write of several fails, Orbax closes the event loop that the others then want to tell of their end, each
    with a traceback; nobody can catch what is raised in a thread of TensorStore.
    """
    logging.getLogger("absl").addFilter(_not_orbaxs)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _not_orbaxs(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


class _Unraisable:
    """`sys.unraisablehook`, without what TensorStore's threads tell a closed event loop."""

    def __init__(self, earlier: Callable[[Any], Any]):
        self._earlier = earlier

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._earlier(unraisable)
