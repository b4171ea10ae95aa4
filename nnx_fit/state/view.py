"""`View`: some of the arrays in a flat list as one pure `nnx.State`, the form that Optax is given, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

if TYPE_CHECKING:
    from nnx_fit.state.layout import Slot


class View:
    """Some slots of a layout, seen as a State with arrays as leaves.

    Args:
        slots: The slots, with their places in the flat list.

    Attributes:
        slots: Those of them that hold arrays.
        positions: Where the State's leaves are in the flat list, in the order of the leaves.
        names: The dotted path of each leaf.
    """

    def __init__(self, slots: Sequence[Slot]):
        self.slots = tuple(slot for slot in slots if slot.shapes)
        places = nnx.from_flat_state([(slot.path, slot.nested(range(slot.start, slot.stop))) for slot in self.slots])
        self.positions: list[int] = jax.tree.leaves(places)
        self._treedef = jax.tree.structure(places)
        name_at = {i: slot.name for slot in self.slots for i in range(slot.start, slot.stop)}
        self.names = [name_at[i] for i in self.positions]

    def state(self, arrays: Sequence[Any]) -> nnx.State:
        """The State with these arrays of the flat list in it."""
        return jax.tree.unflatten(self._treedef, [arrays[i] for i in self.positions])

    def put(self, arrays: Sequence[Any], state: nnx.State) -> list[Any]:
        """A copy of the flat list with the leaves of a State in their places."""
        replaced = list(arrays)
        for position, value in zip(self.positions, self._treedef.flatten_up_to(state), strict=True):
            replaced[position] = value
        return replaced

    def fits(self, state: Any) -> bool:
        """Whether something has the structure of the State."""
        return jax.tree.structure(state) == self._treedef
