"""`Logger`: what the Trainer hands to a place that keeps what was logged.

A subclass implements the calls its store can hold; the others do nothing. All values are host values (Python floats,
NumPy arrays): a logger never waits for a device. What becomes of an exception is told in `failures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nnx_fit.loggers.failures import Failures, guarded
from nnx_fit.loggers.pixels import drawn

Status = Literal["success", "failed", "interrupted"]

# The methods that record something: while a Trainer uses the logger, none of them ends the run.
RECORDING = (
    "log_metrics",
    "log_hyperparams",
    "log_text",
    "log_histogram",
    "log_histograms",
    "log_image",
    "log_figure",
    "log_embedding",
    "log_pr_curve",
    "flush",
    "finalize",
)


class Histogram(NamedTuple):
    """A histogram that was binned elsewhere.

    Attributes:
        counts: Number of values in each bin, shape `(bins,)`.
        edges: Bin edges, shape `(bins + 1,)`.
        moments: `num`, `min`, `max`, `sum` and `sum_squares` of the values.
    """

    counts: np.ndarray
    edges: np.ndarray
    moments: Mapping[str, float]


class Logger:
    """Base class of all loggers.

    A hook may record what `self.log` cannot hold with `trainer.logger`, the first logger, or with each of
    `trainer.loggers`: images, figures, embeddings, precision-recall curves. A logger whose store has no place for
    something does nothing.

    An exception in a method that records does not end the run: it is reported, once for each cause, and the other
    loggers go on. An `NnxFitError` does: `ConfigurationError` says that the logger cannot start at all, or that it was
    given what it cannot record.

    Attributes:
        name: Name of the experiment, or `None`.
        version: Version within the experiment, or `None`.
        failures: Where exceptions are reported to while a Trainer uses the logger; `None` raises them.

    Example:
        >>> import nnx_fit as nf
        >>> class Printed(nf.Logger):
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> Printed().log_metrics({"loss": 0.5}, step=1)
        1 {'loss': 0.5}
    """

    name: str | None = None
    version: str | None = None
    failures: Failures | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in RECORDING:
            method = getattr(cls, name)
            if method is not getattr(Logger, name):
                setattr(cls, name, guarded(method))

    @property
    def log_dir(self) -> Path | None:
        """Directory this logger writes to, or `None` if it writes no files."""
        return None

    @property
    def experiment(self) -> Any:
        """The object of the library behind this logger, for what has no method here; `None` without one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the record is, as plain values: saved in checkpoints, once all that was logged until then is in it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, before `continue_from`, where a checkpoint has it."""

    def continue_from(self, step: int) -> None:
        """Continues the record of an earlier run: what it holds beyond `step` is dropped or hidden.

        Args:
            step: `global_step` of the checkpoint; -1 for a fresh start, where an earlier run may have its records.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars that belong to one step.

        Args:
            metrics: Names and values.
            step: `global_step` after the update they belong to.
        """

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings: plain, possibly nested values."""

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records Markdown text."""

    def log_histogram(
        self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int, moments: Mapping[str, float]
    ) -> None:
        """Records a histogram that was binned elsewhere.

        Args:
            tag: Name.
            counts: Number of values in each bin, shape `(bins,)`.
            edges: Bin edges, shape `(bins + 1,)`.
            step: `global_step`.
            moments: `num`, `min`, `max`, `sum` and `sum_squares` of the values.
        """

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Records the histograms of one step, by tag."""
        for tag, (counts, edges, moments) in histograms.items():
            self.log_histogram(tag, counts, edges, step, moments)

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Records an image.

        Args:
            tag: Name.
            image: Shape `(height, width)` or `(height, width, channels)` with 1, 3 or 4 channels; uint8, or float in
                0..1.
            step: `global_step`.
        """

    def log_figure(self, tag: str, figure: Any, step: int, *, close: bool = True) -> None:
        """Records a matplotlib figure, as the image that it shows.

        Args:
            tag: Name.
            figure: A `matplotlib.figure.Figure`.
            step: `global_step`.
            close: Close the figure afterwards, so that figures made with `pyplot` do not pile up.
        """
        if _overrides(self, "log_image"):
            self.log_image(tag, drawn(tag, figure, close=close), step)

    def log_embedding(
        self, tag: str, vectors: Any, step: int, metadata: Sequence[Any] | None = None, images: Any = None
    ) -> None:
        """Records points in a space of many dimensions, to be looked at in a projection.

        Args:
            tag: Name.
            vectors: Shape `(points, dimensions)`.
            step: `global_step`.
            metadata: A label for each point.
            images: A picture for each point, shape `(points, height, width)` or `(points, height, width, channels)`;
                uint8, or float in 0..1.
        """

    def log_pr_curve(self, tag: str, labels: Any, probabilities: Any, step: int) -> None:
        """Records the precision and recall of a binary classifier over its thresholds.

        Args:
            tag: Name.
            labels: Truth, 0 or 1; any shape.
            probabilities: Predicted probability of a 1, of the same shape.
            step: `global_step`.
        """

    def flush(self) -> None:
        """Puts everything logged so far where it survives the process."""

    def finalize(self, status: Status) -> None:
        """Ends the record; called once when the run ends."""


def _overrides(logger: Logger, method: str) -> bool:
    return getattr(type(logger), method) is not getattr(Logger, method)
