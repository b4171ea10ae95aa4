"""Figures of class-wise metrics: a vector as bars, a matrix as a heat map, drawn where matplotlib is installed."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

logger = logging.getLogger("nnx_fit")

# More labels than this along one axis cannot be read, nor more numbers than its square in the cells of a heat map.
MOST_LABELS = 40


def draw(
    title: str, values: np.ndarray, labels: Sequence[Sequence[str]], axis_names: Sequence[str] = ()
) -> np.ndarray | None:
    """Draws a metric.

    Args:
        title: Its name.
        values: Shape `(classes,)`, drawn as bars, or `(rows, columns)`, drawn as a heat map.
        labels: Names along each axis.
        axis_names: What each axis is.

    Returns:
        The picture, uint8 of shape `(height, width, 3)`, or `None` without matplotlib, which is said once.
    """
    if not _can_draw():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: its figures are global, and it may want a window.
    along = [min(len(each), MOST_LABELS) for each in labels]
    size = (3.0 + 0.32 * along[-1], 3.2 if values.ndim == 1 else 2.2 + 0.32 * along[0])
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=_plain(title))
    names = [[_plain(name) for name in each] for each in labels]
    (_bars if values.ndim == 1 else _heat_map)(figure, axes, values, names)
    for name, set_label in zip(reversed(axis_names), (axes.set_xlabel, axes.set_ylabel), strict=False):
        set_label(_plain(name))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _bars(figure: Any, axes: Any, values: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
    heights = np.where(np.isfinite(values), values, 0.0)
    bars = axes.bar(range(len(values)), heights)
    if len(values) <= MOST_LABELS:
        axes.bar_label(bars, [_short(value) for value in values], fontsize=7)
        axes.set_xticks(range(len(values)), labels[0], rotation=45, ha="right")
    if len(values) and heights.min() >= 0.0 and heights.max() <= 1.0:
        axes.set_ylim(0.0, 1.05)


def _heat_map(figure: Any, axes: Any, values: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
    image = axes.imshow(np.ma.masked_invalid(values), cmap="Blues", aspect="auto")
    figure.colorbar(image)
    for axis, names, set_ticks in ((1, labels[1], axes.set_xticks), (0, labels[0], axes.set_yticks)):
        if values.shape[axis] <= MOST_LABELS:
            set_ticks(range(len(names)), names, **({"rotation": 45, "ha": "right"} if axis == 1 else {}))
    if max(values.shape) <= MOST_LABELS // 2:
        dark = image.norm(np.nan_to_num(values, posinf=0.0, neginf=0.0)) > 0.5
        for (row, column), value in np.ndenumerate(values):
            color = "white" if dark[row, column] else "black"
            axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=color)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which would begin a formula


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2g}"


@functools.cache
def _can_draw() -> bool:
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.warning("Class-wise metrics are recorded but not drawn: matplotlib is missing. Fix: %s", INSTALL)
    return False


INSTALL = "pip install 'nnx-fit[plots]'"
