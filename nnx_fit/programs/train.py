"""The train program: one compiled training step, and the state that goes from step to step.

The state is one flat list that a step takes over and returns: the module's arrays, the optimizer's, the accumulation
window's, the counters and the epoch's accumulators. What is computed is `train_step.py`.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import MetricTable, TooManyMetrics
from nnx_fit.metrics.reduction import Accumulators, empty, grown, on_device
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.programs.live_optimizer import LiveOptimizer
from nnx_fit.programs.metric_state import belongs, fresh
from nnx_fit.programs.parts import Part, Parts
from nnx_fit.programs.precision import first_scale
from nnx_fit.programs.program import Program
from nnx_fit.programs.step import STEP
from nnx_fit.programs.train_options import TrainOptions
from nnx_fit.programs.train_step import TrainStep
from nnx_fit.programs.window import empty_window, widened
from nnx_fit.state.graph import Path
from nnx_fit.state.layout import Layout
from nnx_fit.state.live import Live, copied

# Steps that may be dispatched before the oldest of them has finished: enough to keep a device busy, and a bound on
# the batches that wait in its memory.
IN_FLIGHT = 4


class TrainProgram:
    """The train program with the state it carries.

    Args:
        module: The live module, for messages and for what it is asked outside of a trace.
        graphdef: The module's graphdef in train mode.
        live: The module's values.
        optimizers: The optimizers of its *params*.
        options: What to compile for.
        predecessor: The program that this one takes the place of: its metrics, its counters, and its optimizer's state
            of what is trained by both go on.

    Raises:
        ConfigurationError: A trained Variable cannot be differentiated, or nothing is trained.

    Attributes:
        table: Places of the metrics.
        skipped: Whether the last step was to update and did not, because its gradients overflowed in float16. To know
            it the host waits for each of these steps.
    """

    def __init__(
        self,
        module: Any,
        graphdef: nnx.GraphDef,
        live: Live,
        optimizers: Sequence[BoundOptimizer],
        options: TrainOptions,
        predecessor: TrainProgram | None = None,
    ):
        self._module = module
        self._live = live
        self._layout = live.layout
        self._optimizers = optimizers
        self._options = options
        self.table = MetricTable() if predecessor is None else predecessor.table
        _check_params(module, self._layout)
        self._parts = Parts(optimizers, self._layout, counted=options.manual)
        leaves = jax.tree.leaves(self._parts.init(live.arrays))
        # Copied: an optimizer may keep the very parameters it was given, and both are donated.
        self._opt: list[Any] = copied([jnp.asarray(leaf) for leaf in leaves])
        self._window: list[Any] = []
        self._filled = False  # whether the window has batches in it
        self._scale = copied(first_scale()) if options.precision.scaled else []
        self.skipped = False
        self.set_counters(0, 0, 0)
        self._stepped = False
        self._accumulators = on_device(empty(self.table))
        self._step = TrainStep(module, graphdef, self._layout, self._parts, self.table, options)
        step, compiled = self._step, options.compiled
        whole = step.manual if options.manual else step.whole
        self._whole = Program("The train step", whole, self.table, compiled=compiled)
        self._closing = Program("The train step", step.closing, self.table, compiled=compiled)
        self._adding = Program("The accumulation step", step.adding, self.table, compiled=compiled)
        self._in_flight: collections.deque[Any] = collections.deque()
        if predecessor is not None:
            self._take_over(predecessor)

    def rebuilt(self, graphdef: nnx.GraphDef, live: Live, cause: str) -> TrainProgram:
        """The program for a module that a hook changed, with what this one has learned."""
        for program in self._programs:
            program.sentinel.expect(cause)
        return TrainProgram(self._module, graphdef, live, self._optimizers, self._options, self)

    def _take_over(self, predecessor: TrainProgram) -> None:
        earlier, _ = jax.tree_util.tree_flatten_with_path(predecessor.optimizer_state)
        known = {jax.tree_util.keystr(path): leaf for path, leaf in earlier}
        for i, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(self.optimizer_state)[0]):
            self._opt[i] = _taken(known, jax.tree_util.keystr(path), leaf)
        if predecessor._filled:
            self._filled = True
            sums, rest = predecessor._window[:-3], predecessor._window[-3:]
            known = dict(zip(predecessor._layout.names("params"), sums, strict=True))
            fresh = zip(self._layout.names("params"), self._empty_window()[:-3], strict=True)
            self._window = [*(_taken(known, name, zeros) for name, zeros in fresh), *rest]
        self._counters, self._accumulators = predecessor._counters, predecessor._accumulators
        self._scale, self._stepped = predecessor._scale, predecessor._stepped
        for mine, theirs in zip(self._programs, predecessor._programs, strict=True):
            mine.sentinel = theirs.sentinel

    @property
    def _programs(self) -> list[Program]:
        return [self._whole, self._closing, self._adding]

    @property
    def traced(self) -> bool:
        """Whether a step was traced."""
        return any(program.sentinel.causes for program in self._programs)

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The module's graphdef in train mode, for the next trace."""
        return self._step.graphdef

    @graphdef.setter
    def graphdef(self, graphdef: nnx.GraphDef) -> None:
        self._step.graphdef = graphdef

    @property
    def compilations(self) -> list[str]:
        """Why each of its compilations happened: those of the step that updates, then of the one that accumulates."""
        return [cause for program in self._programs for cause in program.sentinel.causes]

    @property
    def optimizer_state(self) -> Any:
        """The optimizer's state, live arrays: the next step donates them."""
        return jax.tree.unflatten(self._parts.structure, self._opt)

    def set_optimizer_state(self, opt_state: Any) -> None:
        """Takes over another optimizer state of the same structure."""
        self._opt = copied(self._parts.structure.flatten_up_to(opt_state))

    @property
    def optimizers(self) -> list[LiveOptimizer]:
        """The optimizers, for host hooks."""
        return [self._live_optimizer(name, part) for name, part in self._parts.each.items()]

    def _live_optimizer(self, name: str, part: Part) -> LiveOptimizer:
        def write(state: Any) -> None:
            self._opt = jax.tree.leaves(self._parts.assembled({**self._parts.by_name(self._opt), name: state}))

        return LiveOptimizer(
            part, lambda: int(self._counters[STEP]), lambda: self._parts.by_name(self._opt)[name], write
        )

    @property
    def window(self) -> list[Any]:
        """Gradients and metrics of the batches since the last update, see `window.py`; `[]` if there are none."""
        return self._window if self._filled else []

    def set_window(self, window: Sequence[Any]) -> None:
        """Takes over another window, or `[]`."""
        self._window, self._filled = copied(window) if window else [], bool(window)

    @property
    def loss_scale(self) -> list[Any]:
        """The scale of the loss and the updates since it changed, see `precision.py`; `[]` where it is not scaled."""
        return self._scale

    def set_loss_scale(self, scale: Sequence[Any]) -> None:
        """Takes over another scale."""
        self._scale = copied(scale)

    def set_counters(self, global_step: int, epoch: int, batch_idx: int) -> None:
        """Sets what `global_step`, `current_epoch` and `batch_idx` are in the next step."""
        self._counters = jnp.array([global_step, epoch, batch_idx], jnp.int32)

    @property
    def accumulators(self) -> Accumulators:
        """The epoch's metrics so far, a copy that the next step does not donate."""
        return on_device(self._accumulators)

    def reset_accumulators(self) -> None:
        """Starts a new epoch of metrics: also those `nnx.Metric`s start over that the step logs."""
        self._accumulators = on_device(empty(self.table))
        self._reset_metrics(self.table.paths)

    def restore_metrics(self, table: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Continues an epoch's metrics.

        Args:
            table: Which there are, as `MetricTable.state_dict` gave it.
            arrays: What they came to, as `Accumulators.named` gave it.
        """
        self.table.load_state_dict(table)
        self._accumulators = on_device(grown(Accumulators.from_named(arrays), self.table))
        self._stepped = bool(self.table.specs)  # or it was saved before the first step

    def metrics(self) -> dict[str, list[Any]]:
        """What the `nnx.Metric`s hold that the step logs: the arrays of each of their leaves by path."""
        if not (paths := self.table.paths):
            return {}
        arrays = self._live.collect()
        return {slot.name: arrays[slot.start : slot.stop] for slot in self._layout.slots if belongs(slot, paths)}

    def statistics(self) -> dict[str, list[Any]]:
        """What steps change besides parameters and RNG streams: the arrays of each Variable by path."""
        arrays = self._live.collect()
        return {slot.name: arrays[slot.start : slot.stop] for slot in self._layout.slots if slot.role == "stats"}

    def set_metrics(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Gives them back what `metrics` or `statistics` gave."""
        arrays = list(self._live.collect())
        for slot in self._layout.slots:
            if slot.name in values:
                arrays[slot.start : slot.stop] = copied(values[slot.name])
        self._live.replace(arrays)

    def _reset_metrics(self, paths: Sequence[Path]) -> None:
        if paths:
            self.set_metrics(fresh(self._layout, self.graphdef, self._live.collect(), paths))

    def run(self, batch: Any, step: int, updates: bool = True) -> tuple[Any, Any]:
        """Dispatches one step; returns its packed metrics and outputs without waiting for them.

        Args:
            batch: Numeric batch pytree.
            step: `global_step` after this update, or after the next one, for messages.
            updates: Whether the step updates, or adds to the window of accumulation.

        Raises:
            NonFiniteError: `detect_nonfinite` is on and a value is not finite.
        """
        if not updates and self._options.manual:
            raise ConfigurationError(
                "Gradients cannot be accumulated with `automatic_optimization = False`: the step itself decides when "
                "to update.\nFix: wrap the optimizer in optax.MultiSteps, and leave accumulate_grad_batches at 1."
            )
        if not updates and not self._window:
            self._window = self._empty_window()
        program = self._program(updates)
        arrays = self._live.take()
        try:
            carried, (packed, outputs, finite, counted) = program([*arrays, *self._tail(program)], batch)
        except TooManyMetrics:
            self._grow()
            return self.run(batch, step, updates)
        self._stepped = True
        after = self._step.split(carried)
        self._live.arrays, self._opt, self._scale = after.arrays, after.opt, after.scale
        self._counters, self._accumulators = after.counters, after.accumulators
        if program is not self._whole:
            self._window, self._filled = after.window, not updates
        self._in_flight.append(packed)
        if len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        self.skipped = counted is not None and not counted
        if finite is not None:
            self._step.health.raise_if_ill(finite, step)
        return packed, outputs

    def lower(self, batch: Any) -> Any:
        """The program lowered for a batch."""
        program = self._program(updates=True)
        return program.lower([*self._live.arrays, *self._tail(program)], batch)

    def _program(self, updates: bool) -> Program:
        """The program of the next step. A window of one batch is none: what it is depends on the schedule alone."""
        return self._adding if not updates else self._closing if self._filled else self._whole

    def _tail(self, program: Program) -> list[Any]:
        window = [] if program is self._whole else self._window
        return [*self._opt, *window, *self._scale, self._counters, self._accumulators]

    def _empty_window(self) -> list[Any]:
        return empty_window(jax.tree.leaves(self._layout.state("params", self._live.arrays)), self.table.capacity)

    def _grow(self) -> None:
        self.table.grow()
        new = [spec.path for name, spec in self.table.objects.items() if name not in self._accumulators.objects]
        self._accumulators = on_device(grown(self._accumulators, self.table))
        if not self._stepped:  # what they hold is from before this fit, or from its sanity check
            self._reset_metrics([path for path in new if path is not None])
        self._window = widened(self._window, self.table.capacity)


def _taken(known: Mapping[str, Any], name: str, fresh: Any) -> Any:
    """What is known under a name, if it has the shape and dtype of what is there."""
    old = known.get(name)
    return old if old is not None and (old.shape, old.dtype) == (fresh.shape, fresh.dtype) else fresh


def _check_params(module: Any, layout: Layout) -> None:
    slots = layout.select(lambda slot: slot.role == "params")
    if not slots:
        raise ConfigurationError(
            f"Nothing to train: `trainable` ({module.trainable!r}) matches no Variable of "
            f"{type(module).__name__}.\nFix: set `trainable` to a filter that matches, or unfreeze something."
        )
    for slot in slots:
        for shape in slot.shapes:
            if not jnp.issubdtype(shape.dtype, jnp.inexact):
                raise ConfigurationError(
                    f"`{slot.name}` is trained but has dtype {shape.dtype}, which cannot be differentiated.\n"
                    f'Fix: freeze it (`module.freeze("{slot.name}")`), or hold it in an nnx.Variable.'
                )
