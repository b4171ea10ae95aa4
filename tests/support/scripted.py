"""A validation metric that follows a script, so that what callbacks decide is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nets
import numpy as np

import nnx_fit as nf


class ScriptedLoader:
    """One batch per pass, whose target is the next value of the script."""

    def __init__(self, values: Sequence[float]):
        self._values = iter(values)

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield {"target": np.full(2, next(self._values), np.float32)}


def scripted_fit(values: Sequence[float], trainer: nf.Trainer, *, batches: int = 2, **options: Any) -> nf.Trainer:
    """Fits `nets.Scalar` on a few batches per epoch; validation logs `val/target`, the script's values."""
    trainer.fit(nets.Scalar(), nets.targets(*[0.5] * batches), ScriptedLoader(values), **options)
    return trainer
