"""What a process that was cut off had written at the step of its last checkpoint, after that was saved.

TensorBoard hides what lies beyond the step. At the step itself the process that continues logs some things again, with
the same values: they are in the files already, and are not to be there twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_fit.loggers.event_file import EventFile, records
from nnx_fit.loggers.tensorboard_events import proto


class Ahead:
    """What the files of a directory are ahead of a checkpoint, by tag; nothing until a run continues."""

    def __init__(self) -> None:
        self._step = -1
        self._counts: Counter[str] = Counter()
        self._end = ("", 0)

    def state_dict(self, current: EventFile | None) -> dict[str, Any]:
        """Where a record ends now, for a checkpoint.

        Args:
            current: The file that is being written, if this process has written anything.
        """
        file, size = self._end if current is None else (current.path.name, current.size)
        return {"file": file, "size": size, "step": self._step, "ahead": dict(self._counts)}

    def find(self, files: Sequence[Path], step: int, state: Mapping[str, Any]) -> None:
        """Finds what was written after a checkpoint, and belongs to its step.

        Args:
            files: The event files of the directory, oldest first.
            step: `global_step` of the checkpoint.
            state: What `state_dict` gave for it; may be empty.
        """
        self._step, self._counts = step, Counter()
        if state and state["step"] == step:
            self._counts.update(state["ahead"])
        for path in files:
            self._end = (path.name, path.stat().st_size)
            if state and path.name >= state["file"]:
                start = state["size"] if path.name == state["file"] else 0
                for record in records(path, start):
                    event = proto("event").Event.FromString(record)
                    if event.step == step:
                        self._counts.update(value.tag for value in event.summary.value)

    def without(self, summary: Any, step: int) -> Any:
        """A summary without what is there already, or `None` if nothing is left of it."""
        if step != self._step or not self._counts:
            return summary
        new = [value for value in summary.value if not self._is_there(value.tag)]
        return type(summary)(value=new) if new else None

    def _is_there(self, tag: str) -> bool:
        if not self._counts[tag]:
            return False
        self._counts[tag] -= 1
        return True
