"""Running one step hook on a module merged inside a trace: arguments, mode, scope, and what it returned."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.errors import TraceContextError

from nnx_fit.data.batches import batch_size
from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import Capture, MetricSpec
from nnx_fit.metrics.objects import LoggedMetric
from nnx_fit.programs.update import check_gradients
from nnx_fit.scope import StepScope, entered
from nnx_fit.state import graph
from nnx_fit.state.call_flags import filled
from nnx_fit.state.guard import Guard
from nnx_fit.state.layout import raw_value
from nnx_fit.state.reads import recorded
from nnx_fit.state.side_effects import Attributes

# Places in the counters that a program carries, int32 of shape (3,).
STEP, EPOCH, BATCH = range(3)

# Default (on_step, on_epoch) of `self.log` in each step hook.
LOG_DEFAULTS: dict[str, tuple[bool, bool] | None] = {
    "training_step": (True, False),
    "validation_step": (False, True),
    "test_step": (False, True),
    "predict_step": None,
    "on_gradients": (True, False),
}


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step hook did.

    Attributes:
        output: What it returned.
        metrics: (value, weight) of each logged name, traced.
        specs: How each logged name is treated.
        objects: Logged metric objects by name, traced.
    """

    output: Any
    metrics: dict[str, tuple[Any, Any]]
    specs: dict[str, MetricSpec]
    objects: dict[str, LoggedMetric] = dataclasses.field(default_factory=dict)


def run_hook(
    hook: str,
    stage: str,
    module: Any,
    origin: Any,
    batch: Any,
    counters: Any,
    dataloader_idx: int = 0,
    guard: Guard = "error",
    reads: set[str] | None = None,
    optimization: Any = None,
) -> StepResult:
    """Calls a step hook on a merged module, in its mode and scope.

    Args:
        hook: Name of the hook.
        stage: Stage the step belongs to; `"train"` is the one that trains.
        module: The merged module.
        origin: The live module it stands for.
        batch: Batch pytree.
        counters: int32 array of shape `(3,)`: updates completed, epoch, batch index.
        dataloader_idx: Which of several loaders the batch comes from.
        guard: What to do about Python side effects.
        reads: Takes the names of the plain attributes that the step reads.
        optimization: The optimizers of a step that updates by itself.
    """
    attributes = Attributes(module)
    why = f"A mean over the epoch is weighted by it; it was asked for by self.log in {hook}."
    inputs = [*_values(module), batch, counters]
    capture = Capture(hook, LOG_DEFAULTS[hook], functools.partial(size_of, module, batch, why), inputs, module)
    counts = (counters[STEP], counters[EPOCH], counters[BATCH])
    scope = StepScope(hook, stage, module, origin, *counts, capture, optimization)
    names = set() if reads is None else reads
    try:
        with entered(scope), filled(module, training=stage == "train"), recorded(module, names):
            output = _call(getattr(module, hook), batch, counters[BATCH], dataloader_idx)
    except BaseException as error:
        attributes.restore()
        if isinstance(error, TraceContextError):
            error.add_note(
                f"({hook} wrote an nnx.Variable or nnx.Metric that is no part of {type(origin).__name__}, or one of an "
                "outer function in a transform of its own. Fix: make it an attribute of the module in `__init__`.)"
            )
        raise
    attributes.check(hook, guard)
    return StepResult(output, capture.values(), capture.specs(), capture.objects)


def loss_of(output: Any, parameters: Any, hook: str) -> tuple[jax.Array, dict[str, Any]]:
    """The loss and the other outputs of a training step.

    Args:
        output: What the step returned.
        parameters: The traced parameters it was differentiated for.
        hook: Name of the step, for messages.

    Raises:
        ConfigurationError: There is no loss, it is no scalar, or it cannot be differentiated.
    """
    if output is None:
        raise ConfigurationError(
            f"{hook} returned nothing, so there is no loss to minimize.\n"
            'Fix: end it with `return loss`, or `return {"loss": loss, ...}`.'
        )
    extras: dict[str, Any] = {}
    loss = output
    if isinstance(output, Mapping):
        if "loss" not in output:
            keys = ", ".join(repr(key) for key in output)
            raise ConfigurationError(f'{hook} returned a dict without "loss" (its keys: {keys}). Fix: add that key.')
        extras = {key: value for key, value in output.items() if key != "loss"}
        loss = output["loss"]
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | int | float) or isinstance(loss, bool):
        raise ConfigurationError(
            f"{hook} returned a {type(loss).__name__} as loss; expected a scalar array. Fix: `return loss`."
        )
    if jnp.ndim(loss) != 0:
        raise ConfigurationError(
            f"{hook} returned a loss of shape {jnp.shape(loss)}; a loss is one number.\n"
            "Fix: reduce it, for example `return loss.mean()`."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ConfigurationError(
            f"{hook} returned a loss of dtype {jnp.result_type(loss)}, which cannot be differentiated.\n"
            "Fix: compute the loss in floating point (an accuracy or an argmax has no gradient)."
        )
    if not _depends_on(loss, parameters):
        raise ConfigurationError(
            f"{hook} returned a loss that does not depend on any trained parameter, so it has no gradient.\n"
            "Fix: compute it from the module's output; check `trainable`, and that nothing turns it into a constant."
        )
    return jnp.asarray(loss), extras


def extras_of(output: Any) -> tuple[Any, dict[str, Any]]:
    """The loss, for the check of finite values, and the outputs of a step that updates by itself: it owes none."""
    if isinstance(output, Mapping):
        return jnp.asarray(output.get("loss", 0.0)), dict(output)
    if output is None:
        return jnp.float32(0), {}
    if isinstance(output, tuple | list) or jnp.ndim(output):
        raise ConfigurationError(
            f"training_step returned a {type(output).__name__}; one that optimizes by itself returns nothing, a "
            'scalar, or a dict.\nFix: return a dict, which on_train_batch_end gets: {"loss": loss, "images": images}.'
        )
    return jnp.asarray(output), {"loss": output}


def _depends_on(loss: Any, parameters: Any) -> bool:
    """Whether the loss is a tracer of the differentiation that the parameters are in."""
    traces = {id(leaf._trace) for leaf in jax.tree.leaves(parameters) if isinstance(leaf, jax.core.Tracer)}
    return not traces or (isinstance(loss, jax.core.Tracer) and id(loss._trace) in traces)


def run_on_gradients(module: Any, origin: Any, grads: Any, counters: Any) -> StepResult:
    """Calls a merged module's `on_gradients`, in train mode and in a scope where it can log."""
    hook = "on_gradients"
    inputs = [*_values(module), grads, counters]
    capture = Capture(hook, LOG_DEFAULTS[hook], lambda: 1, inputs, module)
    scope = StepScope(hook, "train", module, origin, counters[STEP], counters[EPOCH], counters[BATCH], capture)
    with entered(scope), filled(module, training=True):
        output = module.on_gradients(grads)
    grads = check_gradients(type(origin).__name__, grads, output)
    return StepResult(grads, capture.values(), capture.specs(), capture.objects)


def _values(module: Any) -> list[Any]:
    return [raw_value(leaf) for _, leaf in graph.flatten(module)[1]]


def size_of(module: Any, batch: Any, why: str) -> Any:
    """Number of examples in a batch: what the module's `batch_size` says, or else the leading axis.

    Args:
        module: The module.
        batch: The batch.
        why: What it is needed for, a sentence, for messages.

    Raises:
        ConfigurationError: The leaves of the batch disagree.
    """
    own = getattr(module, "batch_size", None)
    if callable(own):
        return own(batch)
    try:
        return batch_size(batch)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}\n({why})") from None


def _call(hook: Callable[..., Any], batch: Any, batch_idx: Any, dataloader_idx: int) -> Any:
    """Calls a step hook with as many of (batch, batch_idx, dataloader_idx) as it takes, by name or else by order."""
    parameters = list(inspect.signature(hook).parameters.values())
    offered = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return hook(batch, *offered.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    wanted = [p for p in [*positional[1:], *by_name] if p.name in offered or p.default is p.empty]
    if not positional or len(wanted) > len(offered) or any(p in by_name and p.name not in offered for p in wanted):
        raise ConfigurationError(
            f"{hook.__qualname__}{inspect.signature(hook)} is no step hook: it takes (self, batch), optionally "
            "followed by batch_idx and dataloader_idx."
        )
    names = {p.name for p in wanted}
    by_order = iter([name for name in offered if name not in names])
    values = {p.name: offered[p.name if p.name in offered else next(by_order)] for p in wanted}
    first = [values.pop(p.name) for p in wanted if p.kind is p.POSITIONAL_ONLY]
    return hook(batch, *first, **values)
