"""`LearningRateCurve`: the loss over a growing learning rate, what it suggests, and how it is shown.

How the losses come about is in `learning_rate_finder.py`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GrowthMode = Literal["exponential", "linear"]
GROWTH_MODES = get_args(GrowthMode)

# Share of the average so far in the next one.
SMOOTHING = 0.98


def rates_between(low: float, high: float, count: int, mode: GrowthMode) -> np.ndarray:
    """Learning rates from `low` to `high`, both included, shape `(count,)`: equal ratios or equal differences."""
    space = np.geomspace if mode == "exponential" else np.linspace
    return space(low, high, count)


class LearningRateCurve:
    """The loss over a growing learning rate.

    Losses are smoothed by an exponential moving average of the losses `l`, freed of the bias that comes from its
    beginning at zero. With `b = 0.98`, after `n` of them,

        loss_n = (1 - b) * sum(b ** (n - i) * l_i for i in 1 ... n) / (1 - b ** n)

    so that a constant loss is that constant, to the last bit. (Lightning divides by `1 - b ** (n + 1)`, so that a
    constant loss appears to double within the first steps.)

    Args:
        mode: `"exponential"` or `"linear"`: how the rate grows, which decides how the curve is drawn.

    Attributes:
        lr: Learning rates.
        raw_loss: The loss at each.
        loss: The loss at each, smoothed.

    Example:
        >>> from nnx_fit.callbacks.learning_rate_curve import LearningRateCurve
        >>> curve = LearningRateCurve()
        >>> for lr, loss in [(0.001, 2.0), (0.01, 2.0), (0.1, 1.0)]:
        ...     curve.add(lr, loss)
        >>> curve.loss[:2], round(curve.loss[2], 3)
        ([2.0, 2.0], 1.66)
        >>> curve.suggestion(skip_begin=0, skip_end=0)
        0.1
    """

    def __init__(self, mode: GrowthMode = "exponential"):
        self.mode: GrowthMode = mode
        self.lr: list[float] = []
        self.raw_loss: list[float] = []
        self.loss: list[float] = []

    def add(self, lr: float, loss: float) -> None:
        """Adds a step."""
        self.lr.append(float(lr))
        self.raw_loss.append(float(loss))
        before = self.loss[-1] if self.loss else 0.0
        # The formula as a step from the average before: a difference of zero stays one.
        weight = (1 - SMOOTHING) / (1 - SMOOTHING ** len(self.raw_loss))
        self.loss.append(before + weight * (float(loss) - before))

    def diverges(self, threshold: float | None) -> bool:
        """Whether there is no use in going on.

        Args:
            threshold: How many times as large as the smallest loss the last one may be; `None` for any. Of losses that
                may be negative it is the distance that counts: `threshold - 1` times the size of the smallest one.

        Returns:
            True also where the last loss is not finite, since nothing that follows could be.
        """
        last = self.loss[-1]
        if not math.isfinite(last):
            return True
        best = min(self.loss)
        return threshold is not None and last - best > (threshold - 1) * abs(best)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls fastest, per step.

        Args:
            skip_begin: Number of steps at the beginning to leave out, where the average is of a few losses only.
            skip_end: Number of steps at the end to leave out, where the loss may have begun to grow.

        Returns:
            `None` where there are fewer than two steps left, or the loss falls nowhere.
        """
        place = self._steepest(skip_begin, skip_end)
        return None if place is None else self.lr[place]

    def _steepest(self, skip_begin: int, skip_end: int) -> int | None:
        places = np.arange(len(self.loss))[skip_begin : max(0, len(self.loss) - skip_end)]
        losses = np.array(self.loss)
        places = places[np.isfinite(losses[places])]
        if len(places) < 2:
            return None
        slopes = np.gradient(losses[places], places)
        steepest = int(slopes.argmin())
        return int(places[steepest]) if slopes[steepest] < 0 else None

    def plot(self, suggest: bool = False, ax: Any = None, **skipped: int) -> Figure:
        """Draws the curve.

        Args:
            suggest: Mark the suggestion.
            ax: Matplotlib axes to draw on; by default those of a new figure.
            **skipped: `skip_begin` and `skip_end` of `suggestion`.

        Returns:
            The figure, which no window shows: `figure.savefig(path)` writes it.

        Raises:
            ConfigurationError: Matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ConfigurationError(
                    "Matplotlib, which draws the curve, is not installed. Fix: pip install 'nnx-fit[plots]'"
                ) from error
            ax = Figure(figsize=(8, 5)).subplots()
        ax.plot(self.lr, self.raw_loss, color="tab:blue", alpha=0.25, linewidth=1, label="loss of the step")
        ax.plot(self.lr, self.loss, color="tab:blue", label="smoothed")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        if self.mode == "exponential":
            ax.set_xscale("log")
        if suggest and (place := self._steepest(skipped.get("skip_begin", 10), skipped.get("skip_end", 1))) is not None:
            ax.plot(self.lr[place], self.loss[place], "o", color="tab:red", label=f"suggestion {self.lr[place]:.3g}")
        finite = [value for value in self.loss if math.isfinite(value)]
        if finite:  # a step that exploded would leave nothing of the others to be seen
            margin = 0.1 * ((max(finite) - min(finite)) or 1.0)
            ax.set_ylim(min(finite) - margin, max(finite) + margin)
        ax.grid(alpha=0.3)
        ax.legend()
        return ax.figure

    def write_csv(self, path: Path) -> None:
        """Writes the numbers, with a header."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "lr", "raw_loss", "loss"])
            writer.writerows(zip(range(1, len(self.lr) + 1), self.lr, self.raw_loss, self.loss, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The rates and losses."""
        return {"mode": self.mode, "lr": list(self.lr), "raw_loss": list(self.raw_loss)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LearningRateCurve:
        """The curve whose `state_dict` this is."""
        curve = cls(state["mode"])
        losses: Sequence[float] = state["raw_loss"]
        for lr, loss in zip(state["lr"], losses, strict=True):
            curve.add(lr, loss)
        return curve
