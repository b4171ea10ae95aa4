"""The eval programs: one step of validation, test or prediction, which leaves the module as it was.

The module's arrays are read, never donated. What an eval step may change (RNG streams, metric states, caches and what
`eval_mutable` matches) is a scratch copy that goes from batch to batch; of it only the Variables come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nnx_fit.metrics.capture import MetricTable, TooManyMetrics
from nnx_fit.metrics.reduction import Accumulators, accumulate, empty, grown, on_device
from nnx_fit.programs.metric_state import belongs, fresh, metric_paths
from nnx_fit.programs.precision import PRECISIONS, Precision
from nnx_fit.programs.program import Program
from nnx_fit.programs.step import StepResult, run_hook
from nnx_fit.state.filters import matches
from nnx_fit.state.graph import Path
from nnx_fit.state.guard import Guard, always_draws, by_design, report_eval, written
from nnx_fit.state.layout import Layout, Slot
from nnx_fit.state.live import Live, copied
from nnx_fit.state.side_effects import advise_on_randomness

HOOKS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}

# Variables that an eval step may change by their nature.
MUTABLE_TYPES = (nnx.metrics.MetricState, nnx.Cache, nnx.Intermediate)


def is_mutable(slot: Slot, eval_mutable: Any, leaf: Any, metrics: Sequence[Path] = ()) -> bool:
    """Whether an eval step may change a Variable, or an array of one of the metrics at these paths."""
    if slot.role in ("params", "rngs"):
        return False
    if belongs(slot, metrics):
        return True
    if not issubclass(slot.type, nnx.Variable):
        return False
    return issubclass(slot.type, MUTABLE_TYPES) or (
        eval_mutable is not None and matches(eval_mutable, slot.aliases, leaf)
    )


class EvalProgram:
    """The program of one stage and one loader, with the scratch state it carries through a loop.

    Args:
        stage: `"validate"`, `"test"` or `"predict"`.
        module: The live module.
        graphdef: The module's graphdef in eval mode.
        live: The module's values.
        dataloader_idx: Which of several loaders the program is for.
        outputs: Return the step's outputs to the host.
        compiled: Compile, or run eagerly.
        guard: What to do about state that an eval step should not change.
        reads: Takes the names of the plain attributes that the step reads.
        precision: What the step computes in.

    Attributes:
        graphdef: The module's graphdef in eval mode, for the next trace.
        table: Places of the metrics.
    """

    def __init__(
        self,
        stage: str,
        module: Any,
        graphdef: nnx.GraphDef,
        live: Live,
        *,
        dataloader_idx: int = 0,
        outputs: bool = False,
        compiled: bool = True,
        guard: Guard = "error",
        reads: set[str] | None = None,
        precision: Precision = PRECISIONS["32"],
    ):
        self._reads = reads
        self._precision = precision
        self._guard: Guard = guard
        self._stage = stage
        self._module = module
        self.graphdef = graphdef
        self._live = live
        self._layout: Layout = live.layout
        self._dataloader_idx = dataloader_idx
        self._outputs = outputs
        self.table = MetricTable()
        hook = HOOKS[stage]
        self._program = Program(f"The {hook}", self._body, self.table, compiled=compiled)
        rngs = [slot for slot in self._layout.slots if slot.role == "rngs"]
        self._metrics = metric_paths(module)
        self._mutable = [
            slot
            for slot, leaf in zip(self._layout.slots, live.leaves, strict=True)
            if is_mutable(slot, module.eval_mutable, leaf, self._metrics)
        ]
        self._rng_positions = [i for slot in rngs for i in range(slot.start, slot.stop)]
        self._mutable_positions = [i for slot in self._mutable for i in range(slot.start, slot.stop)]
        self._scratch: list[Any] = []
        self._kept: set[int] = set()
        self._advised = False

    @property
    def sentinel(self) -> Any:
        """Counts and explains the program's compilations."""
        return self._program.sentinel

    def begin(self, global_step: int, epoch: int, rngs: list[Any] | None = None) -> None:
        """Starts a loop from the module's current values.

        Args:
            global_step: Updates completed.
            epoch: Index of the epoch.
            rngs: RNG scratch of the loader before this one, to go on from; by default the module's own streams.
        """
        arrays = self._live.collect()
        own = [arrays[i] for i in self._rng_positions]
        # Metrics start over with each loop.
        starts = fresh(self._layout, self.graphdef, arrays, self._metrics)
        mutable = [a for slot in self._mutable for a in starts.get(slot.name, arrays[slot.start : slot.stop])]
        counters = jnp.array([global_step, epoch, 0], jnp.int32)
        self._scratch = [*copied([*(rngs or own), *mutable, counters]), on_device(empty(self.table))]

    def run(self, batch: Any) -> tuple[Any, Any]:
        """Dispatches one step; returns its packed metrics and outputs without waiting for them."""
        try:
            self._scratch, (packed, outputs) = self._program(self._scratch, self._live.collect(), batch)
        except TooManyMetrics:
            self.table.grow()
            self._scratch[-1] = on_device(grown(self._scratch[-1], self.table))
            return self.run(batch)
        return packed, outputs

    @property
    def accumulators(self) -> Accumulators:
        """The loop's metrics so far."""
        return self._scratch[-1]

    @property
    def rngs(self) -> list[Any]:
        """The RNG scratch after the loop."""
        return self._scratch[: len(self._rng_positions)]

    @property
    def carried(self) -> list[int]:
        """Positions in the flat list of arrays of what goes from batch to batch."""
        return [*self._rng_positions, *self._mutable_positions]

    @property
    def scratch(self) -> list[Any]:
        """What goes from batch to batch, metrics aside: the arrays at `carried`, then the counters."""
        return self._scratch[:-1]

    def pure_step(self, scratch: list[Any], arrays: list[Any], batch: Any) -> tuple[Any, list[Any]]:
        """One step as a function of its arguments, for whoever compiles it by other means; it returns no metrics.

        Args:
            scratch: What goes from batch to batch, as `scratch` has it.
            arrays: The module's flat list of arrays; what stands at `carried` is not looked at.
            batch: The batch.

        Returns:
            The step's outputs, and the scratch after it.
        """
        after, (_, outputs) = self._body([*scratch, empty(self.table)], arrays, batch)
        return outputs, after[:-1]

    def finish(self) -> None:
        """Ends the loop: what an eval step may change and did comes back into the module, RNG streams do not."""
        if not self._kept:
            return
        arrays = list(self._live.collect())
        start = len(self._rng_positions)
        for offset, position in enumerate(self._mutable_positions):
            if position in self._kept:
                arrays[position] = self._scratch[start + offset]
        self._live.replace(arrays)

    def _check(self, module: Any, before: list[Any], after: list[Any], again: Callable[[list[Any]], list[Any]]) -> None:
        """Tells of what the step wrote and should not have; notes what it may change."""
        hook, mutable = HOOKS[self._stage], {slot.start for slot in self._mutable}
        self._kept |= {i for i in self._mutable_positions if after[i] is not before[i]}
        counts = [
            slot
            for slot in self._layout.slots
            if issubclass(slot.type, nnx.RngCount) and not always_draws(self._module, slot)
        ]
        if not self._advised and (drawn := written(counts, before, after, again)):
            self._advised = True
            advise_on_randomness(hook, [slot.name for slot in drawn])
        if self._guard == "off":
            return
        watched = [
            slot
            for slot in self._layout.slots
            if slot.role != "rngs" and slot.start not in mutable and not by_design(self._module, slot)
        ]
        if changed := written(watched, before, after, again):
            report_eval(module, changed, hook, self._guard)

    def _body(self, scratch: list[Any], arrays: list[Any], batch: Any) -> tuple[list[Any], Any]:
        positions = self.carried
        counters, accumulators = scratch[-2:]
        current = list(arrays)
        for position, value in zip(positions, scratch[:-2], strict=True):
            current[position] = value
        hook = HOOKS[self._stage]
        current = self._precision.arrays(self._layout, current, frozenset(positions))
        seen = self._precision.batch(batch)

        def step(arrays: list[Any]) -> tuple[Any, StepResult]:
            module = self._layout.merge(self.graphdef, arrays)
            result = run_hook(
                hook,
                self._stage,
                module,
                self._module,
                seen,
                counters,
                self._dataloader_idx,
                guard=self._guard,
                reads=self._reads,
            )
            return module, result

        module, result = step(current)
        after = self._layout.arrays_of(module, step=hook, given=current)
        self._check(
            module, current, after, lambda arrays: self._layout.arrays_of(step(arrays)[0], step=hook, given=current)
        )
        packed = self.table.pack(result.metrics, result.specs)
        new_counters = counters + np.array([0, 0, 1], np.int32)
        new_scratch = [after[position] for position in positions]
        outputs = result.output if self._outputs else None
        new_accumulators = accumulate(accumulators, packed, self.table, result.objects)
        return [*new_scratch, new_counters, new_accumulators], (packed, outputs)
