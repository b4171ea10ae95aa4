"""What a train program is compiled for, and what callbacks may see of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from nnx_fit.options import ClipAlgorithm
from nnx_fit.programs.precision import PRECISIONS, Precision
from nnx_fit.state.guard import Guard


@dataclasses.dataclass(frozen=True)
class StepView:
    """What a callback's `step_metrics` sees of a step, all traced.

    Attributes:
        params: Parameters before the update, pure `nnx.State`.
        grads: Gradients of the update, before clipping; the same structure.
        updates: What Optax adds to the parameters, the same structure.
        new_params: Parameters after the update.
        learning_rates: Learning rate of this update by optimizer name (`""` for a single unnamed one), where known.
        step: Updates completed before this one, int32 scalar.
    """

    params: nnx.State
    grads: nnx.State
    updates: Any
    new_params: nnx.State
    learning_rates: Mapping[str, jax.Array]
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a train program is compiled for.

    Attributes:
        compiled: Compile, or run eagerly.
        outputs: Return the step's outputs to the host, because a hook takes them.
        detect_nonfinite: Check every value of each step.
        guard: What to do about trained parameters that a step writes by hand.
        reads: Takes the names of the plain attributes that the step reads.
        monitors: Functions of a `StepView` that give metrics.
        clip: Limit on the gradients, or `None`.
        clip_algorithm: What the limit is of: the global norm, or each value.
        precision: What steps compute in.
    """

    compiled: bool = True
    outputs: bool = False
    detect_nonfinite: bool = False
    guard: Guard = "error"
    reads: set[str] = dataclasses.field(default_factory=set)
    monitors: tuple[Callable[[StepView], Mapping[str, Any]], ...] = ()
    clip: float | None = None
    clip_algorithm: ClipAlgorithm = "norm"
    precision: Precision = PRECISIONS["32"]
