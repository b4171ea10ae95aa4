"""`Program`: one compiled function over a flat list of donated arrays, and everything about compiling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from nnx_fit.metrics.capture import MetricTable
from nnx_fit.programs.sentinel import Sentinel

# Takes the donated arrays and the rest of the arguments; returns the new arrays and the outputs.
Body = Callable[..., tuple[list[Any], Any]]


class Program:
    """A function of a list of arrays that it takes over, compiled once for each batch shape.

    Args:
        name: What it is, for messages.
        body: The function: `(donated arrays, *arguments) -> (new arrays, outputs)`; the last argument is the batch.
        table: Places of the metrics that the body packs.
        compiled: Whether to compile it, or run it eagerly for debugging.
    """

    def __init__(self, name: str, body: Body, table: MetricTable, *, compiled: bool = True):
        self.table = table
        self.sentinel = Sentinel(name)
        self._body = body
        # Partial arguments would be argument 0; the list that the program takes over is the first run-time argument.
        self._compiled: Any = (
            nnx.jit_partial(self._traced, graph=False, graph_updates=False, donate_argnums=1) if compiled else None
        )

    def _traced(self, arrays: list[Any], *arguments: Any) -> tuple[list[Any], Any]:
        result = self._body(arrays, *arguments)
        self.sentinel.traced(arguments[-1], arrays)
        return result

    def __call__(self, arrays: list[Any], *arguments: Any) -> tuple[list[Any], Any]:
        """Runs the program; `arrays` belong to it from now on.

        Raises:
            TooManyMetrics: The table is full; its vectors must grow before the call is made again.
        """
        if self._compiled is None:
            return self._body(arrays, *arguments)
        # `jit_partial` would go on to write partial arguments back, and there are none: that costs 2% of a small step.
        return self._compiled.jitted_fn([], arrays, *arguments)[0]

    def lower(self, arrays: list[Any], *arguments: Any) -> Any:
        """The program lowered for these arguments; `.compile()` has its cost and memory analysis."""
        return self._compiled.lower(arrays, *arguments)
