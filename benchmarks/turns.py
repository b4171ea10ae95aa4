"""Two fits in one process that take turns: an epoch of the one, then an epoch of the other, never both.

The speed of a machine changes within seconds, so that only what ran side by side can be compared.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from dispatch import Times, loader_of, now, since, trainer_of

from nnx_fit import Callback, FitModule, Trainer

__all__ = ["Turns", "alternate", "quartiles", "trainer_of"]

Fit = Callable[[Path, Callback, int, int], None]  # directory, what times it, epochs, steps of an epoch


class Turns(Callback):
    """Makes every epoch of a `fit` a round that begins when the other fit's has ended."""

    reads_module = False

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore, steps: int) -> None:
        self.times: list[Times] = []
        self._mine, self._other, self._steps = mine, other, steps
        self._start = Times(0, 0)

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        self._mine.acquire()
        jax.block_until_ready(trainer.peek(...))
        self._start = now()

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        jax.block_until_ready(trainer.peek(...))
        if trainer.current_epoch > 0:  # the first epoch compiles
            self.times.append(since(self._start, self._steps))
        self._other.release()


def alternate(one: Fit, other: Fit, steps: int, rounds: int) -> tuple[list[Times], list[Times]]:
    """Times per step of each round of both fits."""
    loader_of(steps)
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    turns = [Turns(first, second, steps), Turns(second, first, steps)]
    with tempfile.TemporaryDirectory() as directory:
        threads = [
            threading.Thread(target=fit, args=(Path(directory, str(i)), turns[i], rounds + 1, steps), daemon=True)
            for i, fit in enumerate((one, other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return turns[0].times, turns[1].times


def quartiles(one: list[Times], other: list[Times], column: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratio of a column over the rounds."""
    ratios = [getattr(a, column) / getattr(b, column) for a, b in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high
