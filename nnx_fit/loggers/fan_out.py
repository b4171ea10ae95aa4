"""All loggers of a run behind one face, so that nothing else counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from nnx_fit.loggers.logger import Logger, Status


class FanOut:
    """Hands every record to every logger, in list order.

    Args:
        loggers: The loggers; none at all is fine.
    """

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = list(loggers)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings."""
        for logger in self.loggers:
            logger.log_hyperparams(params)

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records Markdown text."""
        for logger in self.loggers:
            logger.log_text(tag, text, step)

    def continue_from(self, step: int) -> None:
        """Makes the record go on after a step: what was logged beyond it is of a run that was cut off."""
        for logger in self.loggers:
            logger.continue_from(step)

    def finalize(self, status: Status) -> None:
        """Ends the record."""
        with ExitStack() as stack:  # calls them all, also where one raises
            for logger in reversed(self.loggers):
                stack.callback(logger.finalize, status)
