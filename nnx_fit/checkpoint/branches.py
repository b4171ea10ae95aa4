"""The note that a run has gone back to an older checkpoint, until a checkpoint of its own says so.

The loggers drop what lies beyond that one at once. Were the run cut off before its first save, the branch that it left
behind would otherwise be the newest again, and be continued with a gap in its curves.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from nnx_fit.checkpoint.checksums import write_at_once

_FILE = "went-back.json"


def note(checkpoint: Path, life: int) -> None:
    """Notes beside a checkpoint that a life of the run begins with it."""
    with suppress(OSError):  # the disk is full, perhaps: that is said when a checkpoint cannot be written
        write_at_once(checkpoint.with_name(_FILE), json.dumps({"to": checkpoint.name, "life": life}) + "\n")


def noted(directory: Path) -> tuple[str, int]:
    """The name of the checkpoint that was gone back to last, and the life that began with it; an empty one if none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((directory / _FILE).read_text())
        if isinstance(found["to"], str) and type(found["life"]) is int:
            return found["to"], found["life"]
    return "", 0


def forget(directory: Path, life: int) -> None:
    """Removes the note of a life, or of an earlier one, that has a checkpoint of its own now."""
    with suppress(OSError):
        if noted(directory)[1] <= life:
            (directory / _FILE).unlink(missing_ok=True)
