"""Attempts at saving: one that fails is reported and takes nothing away, and the run goes on to the next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nnx_fit.callbacks.checkpoint_shelf import CheckpointShelf
from nnx_fit.errors import NotWrittenError

if TYPE_CHECKING:
    from nnx_fit.trainer import Trainer

logger = logging.getLogger("nnx_fit")


class Attempts:
    """The saves of one run; each cause of failure is reported once."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def save(
        self, trainer: Trainer, shelf: CheckpointShelf, path: Path, weights_only: bool, asynchronous: bool, last: bool
    ) -> None:
        """Saves the run as it is.

        Args:
            trainer: The Trainer.
            shelf: Where the path was given out.
            path: Directory of the checkpoint.
            weights_only: Leave out what only training needs.
            asynchronous: Write in the background.
            last: Whether this is the last attempt, whose failure is not to be overlooked.

        Raises:
            CheckpointError: The last attempt failed, or what is to be saved is no checkpoint.
        """
        try:
            trainer.save_checkpoint(path, weights_only=weights_only, asynchronous=asynchronous)
        except NotWrittenError as error:
            if last:
                raise
            self._report(error)
            shelf.settle(failed=True)

    def settle(self, trainer: Trainer, shelf: CheckpointShelf) -> None:
        """Waits for the save under way."""
        failed = False
        try:
            trainer.wait_for_checkpoints()
        except NotWrittenError as error:
            failed = True
            self._report(error)
        shelf.settle(failed)

    def _report(self, error: NotWrittenError) -> None:
        if error.reason not in self._reported:
            self._reported.add(error.reason)
            logger.error("%s\nTraining goes on, and the next checkpoint is attempted all the same.", error)
