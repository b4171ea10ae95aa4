"""All loggers of a run behind one face, so that nothing else counts them, and none of them can end the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from nnx_fit.loggers.failures import Failures
from nnx_fit.loggers.logger import Logger, Status


class FanOut:
    """Hands every record to every logger, in list order.

    From here on a failure of a logger is reported instead of raised, whoever calls it; see `Failures`.

    Args:
        loggers: The loggers; none at all is fine.
    """

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = list(loggers)
        for logger in self.loggers:
            if logger.failures is None:
                logger.failures = Failures(_title(logger, self.loggers))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def log_drawing(self, tag: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        """Records an image that is drawn only where a logger keeps images; `None` is none."""
        keeping = [logger for logger in self.loggers if type(logger).log_image is not Logger.log_image]
        image = draw() if keeping else None
        for logger in keeping:
            if image is not None:
                logger.log_image(tag, image, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings."""
        for logger in self.loggers:
            logger.log_hyperparams(params)

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records Markdown text."""
        for logger in self.loggers:
            logger.log_text(tag, text, step)

    def state_dict(self) -> dict[str, Any]:
        """Where the records are, by logger."""
        return {_title(logger, self.loggers): logger.state_dict() for logger in self.loggers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, for the loggers that are still there."""
        for logger in self.loggers:
            logger.load_state_dict(state.get(_title(logger, self.loggers), {}))

    def continue_from(self, step: int) -> None:
        """Makes the record go on after a step: what was logged beyond it is of a run that was cut off."""
        for logger in self.loggers:
            logger.continue_from(step)

    def finalize(self, status: Status) -> None:
        """Ends the record, and says what is missing in it."""
        with ExitStack() as stack:  # calls them all, also where one raises
            for logger in reversed(self.loggers):
                if logger.failures is not None:
                    stack.callback(logger.failures.close)
                stack.callback(logger.finalize, status)


def _title(logger: Logger, loggers: Sequence[Logger]) -> str:
    """A logger's class, with its place in the list where there are several of that class."""
    alike = [other for other in loggers if type(other) is type(logger)]
    kind = type(logger).__name__
    return kind if len(alike) == 1 else f"{kind} (number {loggers.index(logger) + 1} of the loggers)"
