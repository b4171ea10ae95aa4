"""The partition of a module's Variables by role, as users see it.

Every Variable lands in exactly one role: *params* (trained), *frozen* (Params that are not trained), *stats* (every
other non-RNG Variable and bare arrays), *rngs* (RNG keys and counts).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from nnx_fit.state import graph, keys
from nnx_fit.state.layout import ROLES, Layout, Role


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the partition table.

    Attributes:
        path: Dotted path.
        role: `"params"`, `"frozen"`, `"stats"` or `"rngs"`.
        type: Name of the Variable's class.
        shape: Shape, for example `(3, 3, 1, 32)`; several arrays are joined by commas.
        dtype: Dtype, likewise.
        count: Number of elements.
        nbytes: Size in bytes.
    """

    path: str
    role: Role
    type: str
    shape: str
    dtype: str
    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StatePartition:
    """A module's Variables by role. Each State holds the module's own Variables, as `nnx.state` does.

    Attributes:
        params: Trained Variables: the only ones that are differentiated and given to Optax.
        frozen: Params that are not trained.
        stats: Every other Variable that is no RNG state, and bare arrays.
        rngs: RNG keys and counts.
        rows: One `Row` for each Variable, in the module's order.
    """

    params: nnx.State
    frozen: nnx.State
    stats: nnx.State
    rngs: nnx.State
    rows: tuple[Row, ...]

    def totals(self) -> dict[Role, tuple[int, int, int]]:
        """For each role: number of Variables, number of elements, bytes."""
        return {
            role: (
                len(mine := [row for row in self.rows if row.role == role]),
                sum(row.count for row in mine),
                sum(row.nbytes for row in mine),
            )
            for role in ROLES
        }

    def table(self) -> str:
        """The partition as text: path, role, type, shape, dtype and bytes of every Variable, then totals by role."""
        head = ("path", "role", "type", "shape", "dtype", "bytes")
        lines = [head, *((r.path, r.role, r.type, r.shape, r.dtype, f"{r.nbytes:,}") for r in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(line[:-1], widths, strict=False)), line[-1].rjust(widths[-1])]
            )
            for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        text.append("")
        text.extend(
            f"{role:<7} {variables:>5,} Variables  {count:>14,} values  {nbytes:>16,} bytes"
            for role, (variables, count, nbytes) in self.totals().items()
        )
        return "\n".join(text)


def partition(module: nnx.Module, trainable: Any = None) -> StatePartition:
    """Splits a module's Variables by role.

    The filter of what trains is the module's `trainable` attribute (default `nnx.Param`); it is intersected with
    `nnx.Param` unless it names another Variable type.

    Args:
        module: Any NNX module.
        trainable: NNX filter of what trains, instead of the module's own.

    Returns:
        The partition; its States hold the module's own Variables.

    Example:
        >>> from flax import nnx
        >>> import nnx_fit as nf
        >>> parts = nf.partition(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> sorted(parts.params), sorted(parts.stats)
        (['bias', 'scale'], ['mean', 'var'])
    """
    layout = Layout.of(module, getattr(module, "trainable", nnx.Param) if trainable is None else trainable)
    _, leaves = graph.flatten(module)
    flat: dict[Role, list[tuple[graph.Path, Any]]] = {role: [] for role in ROLES}
    for slot, (path, leaf) in zip(layout.slots, leaves, strict=True):
        flat[slot.role].append((path, leaf))
    states = {role: nnx.from_flat_state(items) for role, items in flat.items()}
    return StatePartition(rows=rows(layout), **states)


def rows(layout: Layout) -> tuple[Row, ...]:
    """The lines of the partition table of a layout."""
    return tuple(
        Row(
            path=slot.name,
            role=slot.role,
            type=slot.type.__name__ if issubclass(slot.type, nnx.Variable) else "array",
            shape=", ".join(str(shape.shape) for shape in slot.shapes),
            dtype=", ".join(str(shape.dtype) for shape in slot.shapes),
            count=sum(int(np.prod(shape.shape)) for shape in slot.shapes),
            nbytes=sum(_nbytes(shape) for shape in slot.shapes),
        )
        for slot in layout.slots
    )


def _nbytes(shape: jax.ShapeDtypeStruct) -> int:
    if keys.is_key(shape):
        inner = jax.eval_shape(jax.random.key_data, shape)
        return int(np.prod(inner.shape)) * inner.dtype.itemsize
    return int(np.prod(shape.shape)) * shape.dtype.itemsize
