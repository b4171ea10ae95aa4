"""The train program: forward, backward, update, metrics and counters in one compiled step.

It takes and returns one flat list: the module's arrays, the optimizer's, the counters and the epoch's accumulators.
Only *params* are differentiated and given to Optax; everything else is carried.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import MetricSpec, MetricTable, TooManyMetrics, make_spec, scalar
from nnx_fit.metrics.reduction import accumulate, empty, with_latest
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.programs.health import Health
from nnx_fit.programs.program import Program
from nnx_fit.programs.step import BATCH, EPOCH, STEP, StepResult, loss_of, run_hook
from nnx_fit.state.guard import Guard, by_design, report_train, written
from nnx_fit.state.live import Live, copied

# Steps that may be dispatched before the oldest of them has finished: enough to keep a device busy, and a bound on
# the batches that wait in its memory.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class StepView:
    """What a callback's `step_metrics` sees of a step, all traced.

    Attributes:
        params: Parameters before the update, pure `nnx.State`.
        grads: Gradients, the same structure.
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
    """

    compiled: bool = True
    outputs: bool = False
    detect_nonfinite: bool = False
    guard: Guard = "error"
    reads: set[str] = dataclasses.field(default_factory=set)
    monitors: tuple[Callable[[StepView], Mapping[str, Any]], ...] = ()


class TrainProgram:
    """The train program with the state it carries.

    Args:
        module: The live module, for messages and for what it is asked outside of a trace.
        graphdef: The module's graphdef in train mode.
        live: The module's values.
        optimizer: The optimizer of its *params*.
        options: What to compile for.
        predecessor: The program that this one takes the place of: its metrics, its counters, and its optimizer's state
            of what is trained by both go on.

    Raises:
        ConfigurationError: A trained Variable cannot be differentiated, or nothing is trained.
    """

    def __init__(
        self,
        module: Any,
        graphdef: nnx.GraphDef,
        live: Live,
        optimizer: BoundOptimizer,
        options: TrainOptions,
        predecessor: TrainProgram | None = None,
    ):
        self._module = module
        self._graphdef = graphdef
        self._live = live
        self._layout = live.layout
        self._optimizer = optimizer
        self._options = options
        self._health = Health()
        self.table = MetricTable() if predecessor is None else predecessor.table
        self._program = Program("The train step", self._body, self.table, compiled=options.compiled)
        self._check_params()
        opt_state = optimizer.tx.init(self._layout.state("params", live.arrays))
        leaves, self._opt_structure = jax.tree.flatten(opt_state)
        # Copied: an optimizer may keep the very parameters it was given, and both are donated.
        self._tail: list[Any] = [*copied([jnp.asarray(leaf) for leaf in leaves]), None, None]
        self.set_counters(0, 0, 0)
        self.reset_accumulators()
        self._in_flight: collections.deque[Any] = collections.deque()
        if predecessor is not None:
            self._take_over(predecessor)

    def rebuilt(self, graphdef: nnx.GraphDef, live: Live, cause: str) -> TrainProgram:
        """The program for a module that a hook changed, with what this one has learned."""
        self.sentinel.expect(cause)
        return TrainProgram(self._module, graphdef, live, self._optimizer, self._options, self)

    def _take_over(self, predecessor: TrainProgram) -> None:
        earlier, _ = jax.tree_util.tree_flatten_with_path(predecessor.optimizer_state)
        known = {jax.tree_util.keystr(path): leaf for path, leaf in earlier}
        for i, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(self.optimizer_state)[0]):
            old = known.get(jax.tree_util.keystr(path))
            if old is not None and (old.shape, old.dtype) == (leaf.shape, leaf.dtype):
                self._tail[i] = old
        self._tail[-2:] = predecessor._tail[-2:]
        self._program.sentinel = predecessor.sentinel

    @property
    def sentinel(self) -> Any:
        """Counts and explains the program's compilations."""
        return self._program.sentinel

    @property
    def optimizer_state(self) -> Any:
        """The optimizer's state, live arrays: the next step donates them."""
        return jax.tree.unflatten(self._opt_structure, self._tail[:-2])

    def set_optimizer_state(self, opt_state: Any) -> None:
        """Takes over another optimizer state of the same structure."""
        self._tail[:-2] = copied(self._opt_structure.flatten_up_to(opt_state))

    def set_counters(self, global_step: int, epoch: int, batch_idx: int) -> None:
        """Sets what `global_step`, `current_epoch` and `batch_idx` are in the next step."""
        self._tail[-2] = jnp.array([global_step, epoch, batch_idx], jnp.int32)

    @property
    def accumulators(self) -> Any:
        """The epoch's metrics so far, a copy that the next step does not donate."""
        return jnp.copy(self._tail[-1])

    def reset_accumulators(self, values: Any = None) -> None:
        """Starts a new epoch of metrics, or continues one."""
        self._tail[-1] = jnp.asarray(empty(self.table.capacity) if values is None else values).copy()

    def restore_metrics(self, specs: Sequence[Mapping[str, Any]], accumulators: np.ndarray) -> None:
        """Continues an epoch's metrics.

        Args:
            specs: The metrics in order of their places, as plain dicts.
            accumulators: Their accumulators.
        """
        while self.table.capacity < accumulators.shape[1]:
            self.table.grow()
        for spec in specs:
            self.table.place(MetricSpec(**spec))
        self.reset_accumulators(np.pad(accumulators, ((0, 0), (0, self.table.capacity - accumulators.shape[1]))))

    def run(self, batch: Any, step: int) -> tuple[Any, Any]:
        """Dispatches one step; returns its packed metrics and outputs without waiting for them.

        Args:
            batch: Numeric batch pytree.
            step: `global_step` after this update, for messages.

        Raises:
            NonFiniteError: `detect_nonfinite` is on and a value is not finite.
        """
        size = self._layout.size
        arrays = self._live.take()
        try:
            carried, (packed, outputs, finite) = self._program([*arrays, *self._tail], batch)
        except TooManyMetrics:
            self._grow()
            return self.run(batch, step)
        self._live.arrays = carried[:size]
        self._tail = carried[size:]
        self._in_flight.append(packed)
        if len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        if finite is not None:
            self._health.raise_if_ill(finite, step)
        return packed, outputs

    def lower(self, batch: Any) -> Any:
        """The program lowered for a batch."""
        return self._program.lower([*self._live.arrays, *self._tail], batch)

    def _grow(self) -> None:
        old = np.asarray(self._tail[-1])
        self.table.grow()
        self._tail[-1] = jnp.asarray(np.pad(old, ((0, 0), (0, self.table.capacity - old.shape[1]))))

    def _check_params(self) -> None:
        slots = self._layout.select(lambda slot: slot.role == "params")
        if not slots:
            raise ConfigurationError(
                f"Nothing to train: `trainable` ({self._module.trainable!r}) matches no Variable of "
                f"{type(self._module).__name__}.\nFix: set `trainable` to a filter that matches, or unfreeze something."
            )
        for slot in slots:
            for shape in slot.shapes:
                if not jnp.issubdtype(shape.dtype, jnp.inexact):
                    raise ConfigurationError(
                        f"`{slot.name}` is trained but has dtype {shape.dtype}, which cannot be differentiated.\n"
                        f'Fix: freeze it (`module.freeze("{slot.name}")`), or hold it in an nnx.Variable.'
                    )

    def _body(self, carried: list[Any], batch: Any) -> tuple[list[Any], Any]:
        layout, tx = self._layout, self._optimizer.tx
        arrays, tail = carried[: layout.size], carried[layout.size :]
        opt_state = jax.tree.unflatten(self._opt_structure, tail[:-2])
        counters, accumulators = tail[-2:]
        params = layout.state("params", arrays)
        specs: dict[str, MetricSpec] = {}

        def forward(arrays: list[Any]) -> tuple[StepResult, list[Any]]:
            module = layout.merge(self._graphdef, arrays)
            watch = {"guard": self._options.guard, "reads": self._options.reads}
            result = run_hook("training_step", "train", module, self._module, batch, counters, **watch)
            return result, layout.arrays_of(module, step="training_step")

        def objective(params: nnx.State) -> tuple[jax.Array, Any]:
            given = layout.put("params", arrays, params)
            result, after = forward(given)
            loss, extras = loss_of(result.output, params, type(self._module).__name__)
            self._check_written(given, after, lambda arrays: forward(arrays)[1])
            specs.update(result.specs)
            return loss, (after, result.metrics, extras)

        (loss, (after, metrics, extras)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params = layout.state("params", self._updated_from(arrays, after))
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new_params = jax.tree.map(_keep_dtype, optax.apply_updates(params, updates), params)
        new_opt_leaves = [
            _keep_dtype(new, old)
            for new, old in zip(self._opt_structure.flatten_up_to(new_opt_state), tail[:-2], strict=True)
        ]
        rate = self._optimizer.learning_rate(new_opt_state, counters[STEP])
        view = StepView(
            params=params,
            grads=grads,
            updates=updates,
            new_params=new_params,
            learning_rates={} if rate is None else {self._optimizer.name: rate},
            step=counters[STEP],
        )
        self._monitor(view, metrics, specs)
        packed = self.table.pack(metrics, specs)
        new_arrays = layout.put("params", after, new_params)
        finite = self._finite(loss, metrics, grads, new_arrays) if self._options.detect_nonfinite else None
        new_counters = counters + np.array([1, 0, 1], np.int32)
        new_accumulators = accumulate(accumulators, packed, self.table)
        packed = with_latest(packed, new_accumulators)
        outputs = {"loss": loss, **extras} if self._options.outputs else None
        return [*new_arrays, *new_opt_leaves, new_counters, new_accumulators], (packed, outputs, finite)

    def _check_written(self, before: list[Any], after: list[Any], again: Callable[[list[Any]], list[Any]]) -> None:
        """Tells of trained parameters that the step wrote by hand."""
        if self._options.guard == "off":
            return
        watched = [s for s in self._layout.slots if s.role == "params" and not by_design(self._module, s)]
        if changed := written(watched, before, after, again):
            report_train(changed, self._options.guard)

    def _updated_from(self, before: list[Any], after: list[Any]) -> list[Any]:
        """The values that the optimizer updates: those the step began with, but for layers made to overwrite them."""
        values = list(before)
        for slot in self._layout.slots:
            if slot.role == "params" and by_design(self._module, slot):
                values[slot.start : slot.stop] = after[slot.start : slot.stop]
        return values

    def _monitor(self, view: StepView, metrics: dict[str, tuple[Any, Any]], specs: dict[str, MetricSpec]) -> None:
        for monitor in self._options.monitors:
            for name, value in monitor(view).items():
                metrics[name] = (scalar(name, value), jnp.float32(1))
                specs[name] = make_spec(name, (True, False))

    def _finite(self, loss: Any, metrics: Mapping[str, Any], grads: nnx.State, arrays: Sequence[Any]) -> Any:
        named = [(slot.name, array) for slot in self._layout.slots for array in arrays[slot.start : slot.stop]]
        return self._health.check(
            {
                "loss": (["loss"], [loss]),
                "metric": (list(metrics), [value for value, _ in metrics.values()]),
                "gradient of": (self._layout.names("params"), jax.tree.leaves(grads)),
                "Variable": ([name for name, _ in named], [array for _, array in named]),
            }
        )


def _keep_dtype(new: Any, old: Any) -> Any:
    """An updated value as the next step expects it, so that its program stays the same."""
    new = jnp.asarray(new)
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return new
    return jax.lax.convert_element_type(new, old.dtype)


__all__ = ["BATCH", "EPOCH", "STEP", "StepView", "TrainOptions", "TrainProgram"]
