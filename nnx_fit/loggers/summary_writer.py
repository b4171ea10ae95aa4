"""`summary_writer`: tensorboardX's `SummaryWriter`, writing into the one event file that `TensorBoardLogger` has.

A writer of its own would open a second file, at which TensorBoard stops reading the first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnx_fit.loggers.tensorboard_events import proto


class _Target:
    """What a `SummaryWriter` takes for its event file."""

    def __init__(self, directory: Path, write: Callable[[Any], None]):
        self._directory = directory
        self._write = write
        self._defaults: dict[str, Any] = {}

    def get_logdir(self) -> str:
        return str(self._directory)

    def add_event(self, event: Any, step: int | None = None, walltime: float | None = None) -> None:
        event.wall_time = walltime or self._defaults.get("walltime") or time.time()
        step = self._defaults.get("global_step") if step is None else step
        if step is not None:
            event.step = int(step)
        self._write(event)

    def add_summary(self, summary: Any, global_step: int | None = None, walltime: float | None = None) -> None:
        self.add_event(proto("event").Event(summary=summary), global_step, walltime)

    @contextmanager
    def use_metadata(self, *, global_step: int | None = None, walltime: float | None = None) -> Any:
        self._defaults = {"global_step": global_step, "walltime": walltime}
        try:
            yield self
        finally:
            self._defaults = {}

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """The logger's file is the logger's to close."""


def summary_writer(directory: Path, write: Callable[[Any], None]) -> Any:
    """A `tensorboardX.SummaryWriter` whose events go elsewhere.

    Args:
        directory: The run's directory.
        write: Takes each event, a protocol buffer.
    """
    from tensorboardX import SummaryWriter

    class Writer(SummaryWriter):
        def _get_file_writer(self) -> Any:
            self.file_writer = target
            self.all_writers = {target.get_logdir(): target}
            return target

    target = _Target(directory, write)
    return Writer(str(directory), write_to_disk=False)
