"""`ValidationPlan`: when a fit validates, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nnx_fit.loops.progress import Progress


@dataclasses.dataclass
class ValidationPlan:
    """When a fit validates.

    Attributes:
        run: Runs the validation loop, or `None` when there is none. Its argument is called when all is recorded.
        every_batches: Number of training batches between validations, or `None` for the end of the epoch. A new
            training loader may change it between two epochs.
        every_epochs: Number of epochs between validations; `None` counts batches across epochs.
        finish: Calls the rest of the last hook of a validation, in which a run was saved.
    """

    run: Callable[[Callable[[], None]], Any] | None
    every_batches: int | None = None
    every_epochs: int | None = 1
    finish: Callable[[], None] = lambda: None

    def due_after_batch(self, progress: Progress) -> bool:
        """Whether to validate after the batch that was just trained on."""
        if self.run is None or self.every_batches is None:
            return False
        if self.every_epochs is None:
            return progress.batches % self.every_batches == 0
        return progress.batch_idx % self.every_batches == 0 and self._epoch_due(progress)

    def due_after_epoch(self, progress: Progress) -> bool:
        """Whether to validate at the end of the epoch."""
        return self.run is not None and self.every_batches is None and self._epoch_due(progress)

    def never_due(self, batches: int) -> bool:
        """Whether an epoch of so many batches is too short for a validation."""
        return self.every_epochs is not None and self.every_batches is not None and self.every_batches > batches

    def _epoch_due(self, progress: Progress) -> bool:
        return self.every_epochs is not None and (progress.epoch + 1) % self.every_epochs == 0
