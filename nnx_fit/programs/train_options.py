"""What a train program is compiled for, and what callbacks may see of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.hooks import overrides_gradients
from nnx_fit.options import ClipAlgorithm, Options
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
        hyperparams: What `optax.inject_hyperparams` held for this update, by optimizer name and name.
        step: Updates completed before this one, int32 scalar.
    """

    params: nnx.State
    grads: nnx.State
    updates: Any
    new_params: nnx.State
    learning_rates: Mapping[str, jax.Array]
    hyperparams: Mapping[str, Mapping[str, jax.Array]]
    step: jax.Array


Monitor = Callable[[StepView], Mapping[str, Any]]


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
        manual: Whether the step calls its optimizers by itself.
    """

    compiled: bool = True
    outputs: bool = False
    detect_nonfinite: bool = False
    guard: Guard = "error"
    reads: set[str] = dataclasses.field(default_factory=set)
    monitors: tuple[Monitor, ...] = ()
    clip: float | None = None
    clip_algorithm: ClipAlgorithm = "norm"
    precision: Precision = PRECISIONS["32"]
    manual: bool = False


def train_options(
    options: Options, module: Any, *, outputs: bool, reads: set[str], monitors: tuple[Monitor, ...]
) -> TrainOptions:
    """What a train program is compiled for in a run.

    Args:
        options: What was asked of the run.
        module: The module.
        outputs: Whether a hook takes the step's outputs.
        reads: Takes the names of the plain attributes that the step reads.
        monitors: What callbacks make of a step.

    Raises:
        ConfigurationError: The module optimizes by itself, and something of the run cannot be done then.
    """
    manual = not module.automatic_optimization
    if manual:
        _check_manual(options, module)
    return TrainOptions(
        compiled=options.jit,
        outputs=outputs,
        detect_nonfinite=options.detect_nonfinite,
        guard=options.state_guard,  # type: ignore[arg-type]
        reads=reads,
        monitors=monitors,
        clip=options.gradient_clip_val,
        clip_algorithm=options.gradient_clip_algorithm,
        precision=PRECISIONS[options.precision],
        manual=manual,
    )


def _check_manual(options: Options, module: Any) -> None:
    name = type(module).__name__
    fixes = {
        f"Trainer(accumulate_grad_batches={options.accumulate_grad_batches})": (
            options.accumulate_grad_batches > 1,
            "wrap an optimizer in optax.MultiSteps",
        ),
        f"Trainer(gradient_clip_val={options.gradient_clip_val})": (
            options.gradient_clip_val is not None,
            "put optax.clip_by_global_norm or optax.clip in front of an optimizer with optax.chain",
        ),
        'Trainer(precision="16-mixed")': (
            options.precision == "16-mixed",
            'use precision="bf16-mixed", which needs no scale of the loss',
        ),
        f"{name}.on_gradients": (
            overrides_gradients(module),
            "change the gradients between self.value_and_grad and the optimizer's update",
        ),
    }
    for what, (given, fix) in fixes.items():
        if given:
            raise ConfigurationError(
                f"{what} has no place where {name} sets `automatic_optimization = False`: its training_step makes the "
                f"updates itself.\nFix: {fix}."
            )
