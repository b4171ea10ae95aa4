"""`PredictStep`: the program of `Trainer.predict` as a function of flat lists of arrays, for a compiler to trace."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.export
import numpy as np

from nnx_fit.checkpoint.contents import all_names, module_arrays
from nnx_fit.export import structure
from nnx_fit.export.files import Entry
from nnx_fit.module import FitModule
from nnx_fit.programs.evaluate import EvalProgram
from nnx_fit.programs.precision import Precision
from nnx_fit.programs.step import size_of
from nnx_fit.state.blueprint import Blueprint
from nnx_fit.state.guard import Guard
from nnx_fit.state.live import Live
from nnx_fit.state.side_effects import warn_of_untoggled_modes


class PredictStep:
    """The predict step of a module as a function of flat lists of arrays, and what is to be known of them.

    Args:
        module: The module.
        batch: A batch, its numeric leaves as arrays.
        precision: What the step computes in.
        guard: What to do about state that the step should not change.

    Attributes:
        output: Description of what the step returns, once it was traced.
        start: What goes from batch to batch, as it is before the first one; the counters last.
        weight_names: Names of the arrays that stay.
        state_names: Names of those that go from batch to batch.
    """

    def __init__(self, module: FitModule, batch: Any, precision: Precision, guard: Guard):
        if precision.true:
            module = copy.deepcopy(module)  # its parameters become short
            precision.convert(module, module.trainable)
        if guard != "off":
            warn_of_untoggled_modes(module)
        blueprint = Blueprint(module, module.trainable)
        live = Live(module, blueprint.layout)
        self._program = EvalProgram(
            "predict", module, blueprint.graphdefs[False], live, outputs=True, guard=guard, precision=precision
        )
        self._program.begin(0, 0)  # as for a Trainer that has not trained, whoever else still holds one that has
        self._batch = batch
        self._size = functools.partial(size_of, module, batch, "The program may be called with batches of other sizes.")
        self._layout, self._arrays = blueprint.layout, live.collect()
        self._carried = self._program.carried
        self._fixed = [i for i in range(len(self._arrays)) if i not in set(self._carried)]
        names = all_names(self._layout)
        self.weight_names = [names[i] for i in self._fixed]
        self.state_names = [names[i] for i in self._carried]
        self.start = self._program.scratch
        self.output: Any = None

    def __call__(self, weights: list[Any], state: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """One step."""
        arrays: list[Any] = [None] * len(self._arrays)
        for position, value in zip([*self._fixed, *self._carried], [*weights, *state[:-1]], strict=True):
            arrays[position] = value
        batch = jax.tree.unflatten(jax.tree.structure(self._batch), leaves)
        outputs, state = self._program.pure_step(state, arrays, batch)
        self.output, outputs = structure.describe(outputs, "What predict_step returns")
        return outputs, state

    def entries(self) -> dict[str, Entry]:
        """The arrays by name, as they are before the first batch."""
        arrays = list(self._arrays)
        for position, value in zip(self._carried, self.start, strict=False):
            arrays[position] = value
        groups = module_arrays(self._layout, arrays)
        return {name: Entry.of(value, role) for role, group in groups.items() for name, value in group.items()}

    @property
    def size(self) -> int:
        """The size of the example batch."""
        return int(self._size())

    def shapes(self, batch_size: int | str | None) -> list[jax.ShapeDtypeStruct]:
        """What the arrays of a batch look like.

        Args:
            batch_size: Its size; `"dynamic"` for any, `None` for that of the example.
        """
        leaves = jax.tree.leaves(self._batch)
        size = None if batch_size is None else self.size
        new = jax.export.symbolic_shape("batch")[0] if batch_size == "dynamic" else batch_size
        found = []
        for leaf in leaves:
            aval = jax.eval_shape(lambda x: x, leaf)
            batched = size is not None and aval.ndim > 0 and aval.shape[0] == size
            found.append(jax.ShapeDtypeStruct((new, *aval.shape[1:]) if batched else aval.shape, aval.dtype))
        return found

    def arguments(self, shapes: list[jax.ShapeDtypeStruct]) -> tuple[list[Any], list[Any], list[Any]]:
        """What the function is traced with."""
        like = [jax.ShapeDtypeStruct(np.shape(self._arrays[i]), self._arrays[i].dtype) for i in self._fixed]
        return like, [jax.ShapeDtypeStruct(np.shape(each), each.dtype) for each in self.start], shapes

    def inputs(self, shapes: list[jax.ShapeDtypeStruct]) -> list[dict[str, Any]]:
        """What is to be known of the arrays of a batch where the program is loaded."""
        found = structure.leaves_by_path(self._batch).items()
        return [
            {
                "path": list(path),
                "shown": f"batch{shown}",
                "shape": [size if isinstance(size, int) else None for size in shape.shape],
                "dtype": str(shape.dtype),
            }
            for (path, (shown, _)), shape in zip(found, shapes, strict=True)
        ]
