"""The state of a module's `nnx.Metric`s: where it is in the flat list of arrays, and what it starts a loop with.

It is their `MetricState`s; metrax's wrappers have bare arrays instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from flax import nnx

from nnx_fit.state.graph import Path, modules
from nnx_fit.state.layout import Layout, Slot


def metric_paths(module: Any) -> list[Path]:
    """Where the metrics of a module are."""
    return [path for path, _ in modules(module, nnx.Metric)]


def belongs(slot: Slot, paths: Collection[Path]) -> bool:
    """Whether a leaf of the graph is part of one of these metrics."""
    return slot.role != "rngs" and any(alias[: len(path)] == path for alias in slot.aliases for path in paths)


def fresh(
    layout: Layout, graphdef: nnx.GraphDef, arrays: Sequence[Any], paths: Collection[Path]
) -> dict[str, list[Any]]:
    """What these metrics hold after their `reset`: the arrays of each of their leaves, by its path."""
    found = [slot for slot in layout.slots if belongs(slot, paths)]
    if not found:
        return {}
    module = layout.merge(graphdef, arrays)
    for path, metric in modules(module, nnx.Metric):
        if path in paths:
            metric.reset()
    after = layout.arrays_of(module, step="reset")
    return {slot.name: after[slot.start : slot.stop] for slot in found}
