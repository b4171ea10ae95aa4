"""`LogPoints`: after which updates the host has values of its own to log, next to what the steps logged."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnx_fit.trainer import Trainer


class LogPoints:
    """Tells a callback's `on_train_batch_end` whether what it logs is recorded with this step's metrics.

    A step is asked about once: under accumulation, batches of a window come after a step and are none.
    """

    def __init__(self) -> None:
        self._every = 0
        self._last = 0

    def start(self, trainer: Trainer) -> None:
        """Notes where the run begins or continues."""
        self._every, self._last = trainer.log_every_n_steps, trainer.global_step

    def reached(self, trainer: Trainer) -> bool:
        """Whether the step that was just made is one."""
        step = trainer.global_step
        if not self._every or step % self._every or step <= self._last:
            return False
        self._last = step
        return True

    @property
    def next(self) -> int:
        """`global_step` of the next one, for `paused_until`."""
        return self._last + self._every - self._last % self._every if self._every else sys.maxsize
