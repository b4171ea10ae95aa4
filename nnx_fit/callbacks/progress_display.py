"""How progress is shown: bars that a terminal redraws, or plain lines for a log. When it is shown is the callback's."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from nnx_fit.callbacks.terminal import live_console, record, say

if TYPE_CHECKING:
    from rich.console import Console

# Redrawing may take this share of the time.
_SHARE = 0.02


class Display(Protocol):
    """Shows the progress of stages, of which one may run inside another."""

    def begin(self, stage: str, label: str, total: float) -> None:
        """A stage begins; `total` may be infinite."""

    def update(self, stage: str, completed: int, metrics: Mapping[str, float]) -> float:
        """Shows where a stage is; returns the number of seconds until the next update is worth it."""
        ...

    def end(self, stage: str, completed: int, metrics: Mapping[str, float]) -> None:
        """A stage ends."""

    def close(self) -> None:
        """Nothing more is shown."""


def make_display(*, interval: float, leave: bool) -> Display:
    """The display that suits standard output.

    Args:
        interval: Seconds between two plain lines of one stage.
        leave: Leave the bar of each finished epoch on the terminal.
    """
    console = live_console()
    return PlainDisplay(interval) if console is None else LiveDisplay(console, leave=leave)


class PlainDisplay:
    """One line when a training epoch, a test or a prediction ends, and one now and then while a stage takes long.

    Args:
        interval: Seconds between two lines of one stage.
    """

    def __init__(self, interval: float):
        self._interval = interval
        self._stages: dict[str, tuple[str, float, float]] = {}

    def begin(self, stage: str, label: str, total: float) -> None:
        """Notes the time."""
        self._stages[stage] = (label, total, time.monotonic())

    def update(self, stage: str, completed: int, metrics: Mapping[str, float]) -> float:
        """Writes a line if the stage has been silent for long enough."""
        label, total, start = self._stages[stage]
        elapsed = time.monotonic() - start
        if elapsed < self._interval:
            return self._interval - elapsed
        say(progress_line(label, completed, total, elapsed, metrics))
        return self._interval

    def end(self, stage: str, completed: int, metrics: Mapping[str, float]) -> None:
        """Writes the stage's line; a validation has none, its metrics stand in the epoch's."""
        label, total, start = self._stages.pop(stage)
        if stage in ("train", "test", "predict"):
            say(progress_line(label, completed, total, time.monotonic() - start, metrics))

    def close(self) -> None:
        """Forgets what was under way."""
        self._stages.clear()


class LiveDisplay:
    """Bars that are redrawn in place; what others print appears above them.

    Args:
        console: The terminal.
        leave: Leave the bar of each finished epoch on the terminal.
    """

    def __init__(self, console: Console, *, leave: bool):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._leave = leave
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            # The training loop decides when to redraw: a thread of its own would compete with it.
            auto_refresh=False,
        )
        self._tasks: dict[str, Any] = {}
        self._next = 0.0
        self._labels: dict[str, tuple[str, float, float]] = {}
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._progress.start()
        self._take_handlers()

    def begin(self, stage: str, label: str, total: float) -> None:
        """Shows a new bar, in the place of the stage's last one."""
        if stage in self._tasks and not self._leave:
            self._progress.remove_task(self._tasks[stage])
        known = None if math.isinf(total) else total
        self._labels[stage] = (label, total, time.monotonic())
        self._tasks[stage] = self._progress.add_task(label, total=known, count=_count(0, total), speed="", metrics="")
        self._redraw()

    def update(self, stage: str, completed: int, metrics: Mapping[str, float]) -> float:
        """Moves the bar."""
        self._set(stage, completed, metrics)
        self._redraw()
        return self._next - time.monotonic()

    def end(self, stage: str, completed: int, metrics: Mapping[str, float]) -> None:
        """Completes the bar. That of a validation goes; the others stay until the next one of their stage."""
        self._set(stage, completed, metrics)
        if stage == "validate":
            self._progress.remove_task(self._tasks.pop(stage))
        else:
            label, total, start = self._labels[stage]
            record(progress_line(label, completed, total, time.monotonic() - start, metrics))
        self._redraw()

    def close(self) -> None:
        """Gives the terminal back."""
        self._progress.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []

    def _redraw(self) -> None:
        start = time.monotonic()
        if start >= self._next:
            self._progress.refresh()
            now = time.monotonic()
            self._next = now + max(0.1, (now - start) / _SHARE)

    def _set(self, stage: str, completed: int, metrics: Mapping[str, float]) -> None:
        _, total, start = self._labels[stage]
        self._progress.update(
            self._tasks[stage],
            completed=completed,
            count=_count(completed, total),
            speed=_speed(completed, time.monotonic() - start),
            metrics=_values(metrics),
        )

    def _take_handlers(self) -> None:
        """Lets logging print above the bars: its handlers hold on to the stream they were made with."""
        for name in (None, "nnx_fit"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__):
                    ours = sys.stdout if handler.stream is sys.__stdout__ else sys.stderr
                    if (before := handler.setStream(ours)) is not None:
                        self._handlers.append((handler, before))


def progress_line(label: str, completed: int, total: float, elapsed: float, metrics: Mapping[str, float]) -> str:
    """A stage in one line: `Epoch 0/9: 20/45 [00:02<00:03, 9.1 it/s] train/loss=0.123`."""
    left = ""
    if 0 < completed < total < math.inf:
        left = f"<{_clock(elapsed / completed * (total - completed))}"
    line = f"{label}: {_count(completed, total)} [{_clock(elapsed)}{left}, {_speed(completed, elapsed)}]"
    return f"{line} {_values(metrics)}".rstrip()


def _count(completed: int, total: float) -> str:
    return f"{completed}" if math.isinf(total) else f"{completed}/{total:.0f}"


def _speed(completed: int, elapsed: float) -> str:
    return f"{completed / elapsed:.3g} it/s" if elapsed > 0 and completed else "? it/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _values(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
