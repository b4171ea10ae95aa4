"""`BestWeights`: the module's values as they were at the best value of a metric, kept aside and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from nnx_fit.callbacks.ema_weights import EMAWeights
from nnx_fit.callbacks.monitor import Mode, better, worst
from nnx_fit.callbacks.weights import current_variables, fill, layout_of, names_of
from nnx_fit.state.live import copied

if TYPE_CHECKING:
    from nnx_fit.state.layout import Slot
    from nnx_fit.trainer import Trainer


class BestWeights:
    """Parameters, frozen ones and running statistics at the best value so far; RNG streams do not belong to it.

    They stay on the device: a copy of the module's arrays. Where an `EMAWeights` is evaluated, the average takes the
    place of the parameters, since it is what the metric was measured with.

    Args:
        mode: Which of two values is better.

    Attributes:
        score: The best value.
        step: `global_step` at that value, -1 before the first.
        arrays: The arrays by name; none before the first value, and where another run had it.
    """

    def __init__(self, mode: Mode):
        self.mode: Mode = mode
        self.score = worst(mode)
        self.step = -1
        self.arrays: dict[str, jax.Array] = {}

    def offer(self, value: float, trainer: Trainer) -> None:
        """Keeps the values of now, if this is the best value so far."""
        if not math.isfinite(value) or not better(self.mode, value, self.score):
            return
        self.score, self.step = value, trainer.global_step
        live = trainer.peek(...)
        names = [name for slot in layout_of(trainer).slots if _kept(slot) for name in names_of(slot)]
        self.arrays = dict(zip(names, copied([live[name] for name in names]), strict=True)) | _average(trainer)

    def put_back(self, trainer: Trainer) -> None:
        """Writes what is kept into the module."""
        layout, fitting = layout_of(trainer), {}
        for slot in layout.slots:
            for name, shape in zip(names_of(slot), slot.shapes, strict=True):
                array = self.arrays.get(name)
                if _kept(slot) and array is not None and array.shape == shape.shape:
                    fitting[name] = jnp.copy(array).astype(shape.dtype)
        fill(layout, current_variables(trainer), fitting, trainer.module)

    def state_dict(self) -> dict[str, Any]:
        """Which values these are."""
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.score, self.step = float(state["score"]), int(state["step"])

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Takes the arrays of a checkpoint."""
        self.arrays = {name: jnp.array(array) for name, array in arrays.items()}


def _kept(slot: Slot) -> bool:
    """Whether a Variable's arrays are kept: weights and statistics, and no PRNG keys."""
    return slot.role != "rngs" and not any(slot.impls)


def _average(trainer: Trainer) -> dict[str, jax.Array]:
    if not trainer.validation_enabled:
        return {}
    averages = [each for each in trainer.callbacks if isinstance(each, EMAWeights) and each.use_for_eval]
    return averages[0].weights if averages else {}
