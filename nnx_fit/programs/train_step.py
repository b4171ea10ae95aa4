"""What a train program computes: forward, backward, update, metrics and counters, all of it traced.

Only *params* are differentiated and given to Optax; everything else is carried. A step that does not update adds its
gradients to the window of accumulation instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nnx_fit.hooks import overrides_gradients
from nnx_fit.metrics.capture import MetricTable
from nnx_fit.metrics.reduction import accumulate, with_latest
from nnx_fit.programs import window as windows
from nnx_fit.programs.health import Health
from nnx_fit.programs.logged import Logged
from nnx_fit.programs.manual import ManualOptimization
from nnx_fit.programs.parts import Parts
from nnx_fit.programs.precision import all_finite, kept_unless, next_scale
from nnx_fit.programs.step import STEP, StepResult, extras_of, loss_of, run_hook, run_on_gradients, size_of
from nnx_fit.programs.train_options import StepView, TrainOptions
from nnx_fit.programs.update import clipped
from nnx_fit.state.guard import by_design, report_train, written
from nnx_fit.state.layout import Layout


class Carried(NamedTuple):
    """What goes from step to step.

    Attributes:
        arrays: The module's arrays.
        opt: The arrays of the optimizer's state.
        window: The accumulation window, see `window.py`; empty if the step has none.
        scale: The scale of the loss, see `precision.py`; empty if it has none.
        counters: `global_step`, epoch and batch index, int32 of shape `(3,)`.
        accumulators: The epoch's metrics.
    """

    arrays: list[Any]
    opt: list[Any]
    window: list[Any]
    scale: list[Any]
    counters: Any
    accumulators: Any


_STEPS, _BATCHES = np.array([1, 0, 0], np.int32), np.array([0, 0, 1], np.int32)


class TrainStep:
    """The traced function of a train program.

    It takes and returns one flat list: the module's arrays, the optimizer's, the window's if there is one, the counters
    and the epoch's accumulators.

    Args:
        module: The live module, for messages and for what it is asked outside of a trace.
        graphdef: The module's graphdef in train mode.
        layout: Where each leaf is in the list of the module's arrays.
        parts: The optimizers of its *params*, initialised.
        table: Places of the metrics.
        options: What to compile for.

    Attributes:
        graphdef: The module's graphdef in train mode, for the next trace.
        health: Checks and names values that are not finite.
    """

    def __init__(
        self,
        module: Any,
        graphdef: nnx.GraphDef,
        layout: Layout,
        parts: Parts,
        table: MetricTable,
        options: TrainOptions,
    ):
        self._module = module
        self.graphdef = graphdef
        self._layout = layout
        self._parts = parts
        self._table = table
        self._options = options
        self.health = Health()

    def whole(self, carried: list[Any], batch: Any) -> tuple[list[Any], Any]:
        """A step that updates, from one batch alone."""
        return self._step(carried, batch, windowed=False, updates=True)

    def closing(self, carried: list[Any], batch: Any) -> tuple[list[Any], Any]:
        """A step that updates, from the batches of a window of which this is the last."""
        return self._step(carried, batch, windowed=True, updates=True)

    def manual(self, carried: list[Any], batch: Any) -> tuple[list[Any], Any]:
        """A step that calls its optimizers by itself."""
        layout, options = self._layout, self._options
        before, opt_leaves, _, _, counters, _ = parts = self.split(carried)
        module = layout.merge(self.graphdef, before)
        steps = ManualOptimization(module, layout, self._parts, opt_leaves, options.precision, options.guard)
        watch = {"guard": options.guard, "reads": options.reads, "optimization": steps}
        seen = options.precision.batch(batch)
        result = run_hook("training_step", "train", module, self._module, seen, counters, **watch)
        after = layout.arrays_of(module, step="training_step")
        steps.check_used(f"{type(self._module).__name__}.training_step")
        logged = Logged(dict(result.metrics), dict(result.specs), dict(result.objects))
        old, new, grads = layout.state("params", before), layout.state("params", after), steps.all_grads(before)
        view = StepView(
            params=old,
            grads=grads,
            updates=jax.tree.map(jnp.subtract, new, old),
            new_params=new,
            learning_rates=steps.learning_rates,
            hyperparams=steps.hyperparams,
            step=counters[STEP],
        )
        logged.monitor(view, options.monitors)
        packed = self._table.pack(logged.values, logged.specs)
        loss, extras = extras_of(result.output)
        finite = self._finite(loss, logged.values, grads, after) if options.detect_nonfinite else None
        accumulators = accumulate(parts.accumulators, packed, self._table, logged.objects)
        outputs = extras if options.outputs else None
        carried = [*after, *steps.opt, counters + _BATCHES + _STEPS, accumulators]
        return carried, (with_latest(packed, accumulators), outputs, finite, None)

    def adding(self, carried: list[Any], batch: Any) -> tuple[list[Any], Any]:
        """A step that adds its gradients to a window and updates nothing but the other state."""
        return self._step(carried, batch, windowed=True, updates=False)

    def split(self, carried: Sequence[Any]) -> Carried:
        """The parts of the flat list that a step takes and returns."""
        opt_start = self._layout.size
        window_start = opt_start + self._parts.structure.num_leaves
        scale_start = len(carried) - 2 - 2 * self._options.precision.scaled
        return Carried(
            list(carried[:opt_start]),
            list(carried[opt_start:window_start]),
            list(carried[window_start:scale_start]),
            list(carried[scale_start:-2]),
            carried[-2],
            carried[-1],
        )

    def _step(self, carried: list[Any], batch: Any, *, windowed: bool, updates: bool) -> tuple[list[Any], Any]:
        layout, scaled = self._layout, self._options.precision.scaled
        arrays, opt_leaves, window, scale, counters, accumulators = self.split(carried)
        loss, grads, after, logged, extras = self._backward(arrays, batch, counters, scale)
        batch_names, size, mean_loss = list(logged.values), None, loss
        if windowed:
            leaves, structure = jax.tree.flatten(grads)
            size = size_of(self._module, batch, "The gradients of a window are weighted by it.")
            window = windows.with_gradients(window, leaves, loss, size)
            if updates:
                leaves, mean_loss = windows.mean_gradients(window, leaves)
                grads = jax.tree.unflatten(structure, leaves)
        before = layout.state("params", self._updated_from(arrays, after))
        params, counted = before, None
        if updates:
            grads, after = self._on_gradients(grads, after, counters, logged)
            params, new_opt_leaves = self._update(grads, opt_leaves, before, counters, logged, mean_loss)
            if scaled:
                counted = all_finite(grads)
                params = jax.tree.map(lambda new, old: jnp.where(counted, new, old), params, before)
                new_opt_leaves = kept_unless(counted, new_opt_leaves, opt_leaves)
                after = self._statistics_unless(counted, after, arrays)
                scale = next_scale(scale, counted)
            opt_leaves = new_opt_leaves
        packed = self._table.pack(logged.values, logged.specs)
        new_arrays = layout.put("params", after, params)
        finite = self._finite(loss, logged.values, grads, new_arrays) if self._options.detect_nonfinite else None
        new_counters = counters + _BATCHES + _STEPS * (int(updates) if counted is None else counted.astype(jnp.int32))
        new_accumulators = accumulate(accumulators, packed, self._table, logged.objects)
        if windowed:
            window = windows.with_metrics(window, packed, self._table.are(batch_names), size)
            if updates:
                packed, window = windows.mean_metrics(window, packed), windows.emptied(window)
        packed = with_latest(packed, new_accumulators)
        outputs = {"loss": loss, **extras} if self._options.outputs else None
        carried = [*new_arrays, *opt_leaves, *window, *scale, new_counters, new_accumulators]
        return carried, (packed, outputs, finite, counted)

    def _backward(
        self, arrays: list[Any], batch: Any, counters: Any, scale: list[Any]
    ) -> tuple[Any, Any, list[Any], Logged, Any]:
        """Loss and gradients of a batch, the arrays after the step, what it logged and returned beside the loss."""
        layout, logged, precision = self._layout, Logged(), self._options.precision
        seen = precision.batch(batch)

        def forward(given: list[Any]) -> tuple[StepResult, list[Any]]:
            module = layout.merge(self.graphdef, given)
            watch = {"guard": self._options.guard, "reads": self._options.reads}
            result = run_hook("training_step", "train", module, self._module, seen, counters, **watch)
            return result, layout.arrays_of(module, step="training_step", given=given)

        def objective(params: nnx.State) -> tuple[jax.Array, Any]:
            exact = layout.put("params", arrays, params)
            given = precision.arrays(layout, exact)
            result, after = forward(given)
            if own := precision.written_short(layout, exact, given, after, lambda arrays: forward(arrays)[1]):
                given = precision.arrays(layout, exact, own)
                result, after = forward(given)
            loss, extras = loss_of(result.output, params, f"{type(self._module).__name__}.training_step")
            self._check_written(given, after, lambda arrays: forward(arrays)[1])
            logged.specs.update(result.specs)
            if precision.compute is not None:
                loss = loss.astype(jnp.float32)
            after = precision.restored(arrays, given, after)
            return loss * scale[0] if scale else loss, (loss, after, result.metrics, result.objects, extras)

        (_, found), grads = jax.value_and_grad(objective, has_aux=True)(layout.state("params", arrays))
        loss, after, metrics, objects, extras = found
        logged.values.update(metrics)
        logged.objects.update(objects)
        if scale:
            grads = jax.tree.map(lambda gradient: (gradient / scale[0]).astype(gradient.dtype), grads)
        return loss, grads, after, logged, extras

    def _statistics_unless(self, finite: jax.Array, new: list[Any], old: list[Any]) -> list[Any]:
        """The arrays with the running statistics of a step whose gradients overflowed as they were."""
        kept = list(new)
        for i in self._layout.positions("stats"):
            kept[i] = jnp.where(finite, new[i], old[i])
        return kept

    def _on_gradients(
        self, grads: nnx.State, after: list[Any], counters: Any, logged: Logged
    ) -> tuple[nnx.State, list[Any]]:
        """What the user's `on_gradients` makes of the gradients, and of the module's other state."""
        if not overrides_gradients(self._module):
            return grads, after
        module = self._layout.merge(self.graphdef, after)
        result = run_on_gradients(module, self._module, grads, counters)
        logged.add(result)
        return result.output, self._layout.arrays_of(module, step="on_gradients")

    def _update(
        self, grads: nnx.State, opt_leaves: list[Any], params: nnx.State, counters: Any, logged: Logged, loss: Any
    ) -> tuple[nnx.State, list[Any]]:
        """The parameters and the arrays of the optimizers after an update."""
        used = clipped(grads, self._options.clip, self._options.clip_algorithm)
        made = self._parts.update(used, opt_leaves, params, counters[STEP], loss)
        view = StepView(
            params=params,
            grads=grads,
            updates=made.updates,
            new_params=made.params,
            learning_rates=made.learning_rates,
            hyperparams=made.hyperparams,
            step=counters[STEP],
        )
        logged.monitor(view, self._options.monitors)
        return made.params, made.opt

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

    def _finite(self, loss: Any, metrics: Mapping[str, Any], grads: nnx.State, arrays: Sequence[Any]) -> Any:
        named = [(slot.name, array) for slot in self._layout.slots for array in arrays[slot.start : slot.stop]]
        return self.health.check(
            {
                "loss": (["loss"], [loss]),
                "metric": (list(metrics), [value for value, _ in metrics.values()]),
                "gradient of": (self._layout.names("params"), jax.tree.leaves(grads)),
                "Variable": ([name for name, _ in named], [array for _, array in named]),
            }
        )
