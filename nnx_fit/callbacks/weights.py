"""Arrays of a module by name, as `trainer.peek` names them: which Variable each is of, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flax import nnx

from nnx_fit.state import graph
from nnx_fit.state.layout import Layout, Slot

if TYPE_CHECKING:
    from nnx_fit.trainer import Trainer

# A Variable, its place in the layout, and the raw value that it had.
Displaced = tuple[Slot, nnx.Variable, Any]


def names_of(slot: Slot) -> list[str]:
    """The names that `trainer.peek` has for the arrays of a Variable."""
    return [slot.name] if len(slot.shapes) == 1 else [f"{slot.name}[{i}]" for i in range(len(slot.shapes))]


def layout_of(trainer: Trainer) -> Layout:
    """The layout of the module in the run that is under way."""
    assert trainer.layout is not None, "no run is under way"
    return trainer.layout


def current_variables(trainer: Trainer) -> dict[graph.Path, Any]:
    """The Variables (and bare arrays) of a run's module by path, brought up to date, RNG streams aside."""
    parts = trainer.partition
    return {
        path: leaf for state in (parts.params, parts.frozen, parts.stats) for path, leaf in nnx.to_flat_state(state)
    }


def fill(
    layout: Layout,
    variables: Mapping[graph.Path, Any],
    values: Mapping[str, Any],
    module: nnx.Module | None = None,
) -> list[Displaced]:
    """Writes arrays into the Variables that they are of.

    Args:
        layout: The module's layout.
        variables: Its Variables by path, up to date.
        values: Arrays by name. A Variable of which not all arrays are there keeps its value.
        module: The module, whose attributes that are bare arrays are written as well.

    Returns:
        What was in the Variables before.
    """
    before = []
    for slot in layout.slots:
        names = names_of(slot)
        if not names or not all(name in values for name in names):
            continue
        raw = slot.value([values[name] for name in names])
        variable = variables.get(slot.path)
        if isinstance(variable, nnx.Variable):
            before.append((slot, variable, variable.get_raw_value()))
            variable.set_raw_value(raw)
        elif module is not None:
            graph.replace_array(module, slot.path, raw)
    return before
