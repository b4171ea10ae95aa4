"""Which arrays of a module a monitor watches, under which tags, and what is known of how each of them moves.

A running statistic moves by its layer's momentum; a trained parameter moves by the optimizer's update. Reading the
values is left to the monitor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.state import graph

if TYPE_CHECKING:
    from nnx_fit.state.layout import Slot
    from nnx_fit.trainer import Trainer

_STATISTIC = re.compile(r"mean|var|std")


@dataclasses.dataclass(frozen=True)
class Watched:
    """One array that is watched.

    Attributes:
        name: Its name in `trainer.peek`.
        path: Path of its Variable.
        tag: What its records begin with: `state/<path>` or `params/<path>`.
        layer: Dotted path of the layer it belongs to.
        size: Number of elements.
        decay: What a step keeps of a running statistic, in 0..1; `None` where it is not known to be one.
        trained: Whether the optimizer updates it.
    """

    name: str
    path: graph.Path
    tag: str
    layer: str
    size: int
    decay: float | None
    trained: bool


def find_watched(trainer: Trainer, include: Any, params: bool) -> list[Watched]:
    """The arrays to watch, in the order of the module's graph.

    Args:
        trainer: The Trainer, in a run.
        include: NNX filter, or `None` for the *stats* role.
        params: Whether parameters belong to it, trained and frozen ones.
    """
    layout = trainer.layout
    if layout is None:
        return []
    included = set(trainer.peek(include)) if include is not None else set()
    owners = dict(graph.modules(trainer.module))
    found = []
    for slot in layout.slots:
        is_param = slot.role in ("params", "frozen")
        for name, tag, shape in _arrays(slot):
            wanted = name in included if include is not None else slot.role == "stats"
            if (wanted or (params and is_param)) and _is_numeric(shape):
                found.append(
                    Watched(
                        name=name,
                        path=slot.path,
                        tag=f"{'params' if is_param else 'state'}/{tag}",
                        layer=layer_of(slot.path),
                        size=shape.size,
                        decay=_decay(owners.get(slot.path[:-1]), slot, shape),
                        trained=slot.role == "params",
                    )
                )
    return found


def layer_of(path: Sequence[Any]) -> str:
    """The dotted path of the layer that holds a Variable; the Variable's own name at the root."""
    return graph.path_name(tuple(path[:-1]) or tuple(path))


class AtPaths:
    """NNX filter that matches the Variables at these paths."""

    def __init__(self, watched: Sequence[Watched]):
        self._paths = {array.path for array in watched}

    def __call__(self, path: graph.Path, value: Any) -> bool:
        """Whether a Variable is one of them."""
        del value
        return path in self._paths


def _arrays(slot: Slot) -> Iterator[tuple[str, str, Any]]:
    """The name in `peek`, the readable name and the shape of each array; a Variable may hold a pytree of them."""
    if len(slot.shapes) == 1:
        yield slot.name, slot.name, slot.shapes[0]
        return
    inside = jax.tree_util.tree_flatten_with_path(slot.value(range(len(slot.shapes))))[0] if not any(slot.impls) else []
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in inside if type(leaf) is int]
    for i, shape in enumerate(slot.shapes):
        readable = keys[i] if len(keys) == len(slot.shapes) else str(i)
        yield f"{slot.name}[{i}]", f"{slot.name}.{readable}", shape


def _is_numeric(shape: Any) -> bool:
    return shape.size > 0 and (jnp.issubdtype(shape.dtype, jnp.number) or shape.dtype == jnp.bool_)


def _decay(owner: Any, slot: Slot, shape: Any) -> float | None:
    """What one step keeps of a running statistic.

    Flax calls it the momentum. PyTorch calls what a step *takes in* the momentum, and layers written by hand follow
    the one or the other; a running average keeps more than it takes, so the larger share is what is kept.
    """
    is_statistic = issubclass(slot.type, nnx.BatchStat) or _STATISTIC.search(str(slot.path[-1])) is not None
    if slot.role != "stats" or not is_statistic or not jnp.issubdtype(shape.dtype, jnp.floating):
        return None
    momentum = vars(owner).get("momentum") if owner is not None else None
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum < 1:
        return None
    return float(momentum) if isinstance(owner, nnx.BatchNorm) else float(max(momentum, 1 - momentum))
