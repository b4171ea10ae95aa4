"""`Logger`: what the Trainer hands to a place that keeps what was logged.

A subclass implements the calls its store can hold; the others do nothing. All values are host values (Python floats,
NumPy arrays): a logger never waits for a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Status = Literal["success", "failed", "interrupted"]


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

    Attributes:
        name: Name of the experiment, or `None`.
        version: Version within the experiment, or `None`.
    """

    name: str | None = None
    version: str | None = None

    @property
    def log_dir(self) -> Path | None:
        """Directory this logger writes to, or `None` if it writes no files."""
        return None

    def continue_from(self, step: int) -> None:
        """Continues the record of an earlier run: what it holds beyond `step` is dropped or hidden."""

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

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Records an image of shape `(height, width, channels)`, uint8 or float in 0..1."""

    def flush(self) -> None:
        """Puts everything logged so far where it survives the process."""

    def finalize(self, status: Status) -> None:
        """Ends the record; called once when the run ends."""
