"""`Layout`: a module's leaves as one flat list of arrays, which is what a compiled program takes and returns.

Each leaf of the graph, a Variable or a bare array, has a `Slot` with its role and its place in the list. The role is
decided here; what users see of it is `partition.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nnx_fit.errors import StateError
from nnx_fit.state import graph, keys
from nnx_fit.state.filters import Parts, check_edits, matches, names_type_of
from nnx_fit.state.view import View

Role = Literal["params", "frozen", "stats", "rngs"]
ROLES: tuple[Role, ...] = get_args(Role)

_ARRAY = object()


@dataclasses.dataclass(frozen=True)
class Slot:
    """One leaf of the graph: a Variable or a bare array, with its place in the flat list of arrays.

    Attributes:
        path: The first path that leads to it.
        aliases: Every path that leads to it, `path` included.
        type: The Variable's class, or `jax.Array` for a bare array.
        role: The role it plays.
        start: Position of its first array in the flat list.
        treedef: Structure of its value; most hold one array, but a Variable may hold any pytree.
        statics: For each leaf of the value, the marker for an array, or the leaf itself where it is none.
        shapes: Shape and dtype of each array.
        impls: For each array the generator of its PRNG keys, or `None` where it holds none. The flat list has the
            keys' data in its place.
        takers: Which of the optimizers want to train it, where there are several.
    """

    path: graph.Path
    aliases: tuple[graph.Path, ...]
    type: type
    role: Role
    start: int
    treedef: Any
    statics: tuple[Any, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    impls: tuple[Any, ...]
    takers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The dotted path."""
        return graph.path_name(self.path)

    @functools.cached_property
    def stop(self) -> int:
        """One past the position of its last array in the flat list."""
        return self.start + len(self.shapes)

    @functools.cached_property
    def single(self) -> bool:
        """Whether the value is one array and no key, so that its raw value is the array of the flat list itself."""
        return self.treedef == _LEAF and self.statics == (_ARRAY,) and self.impls == (None,)

    def typed(self, arrays: Sequence[Any]) -> list[Any]:
        """Its arrays of the flat list as users know them: keys as keys."""
        return [keys.key_of(array, impl) for array, impl in zip(arrays, self.impls, strict=True)]

    def value(self, arrays: Sequence[Any]) -> Any:
        """The Variable's value with these arrays of the flat list in it."""
        if self.single:
            return arrays[0]
        rest = iter(self.typed(arrays))
        leaves = [next(rest) if static is _ARRAY else static for static in self.statics]
        return jax.tree.unflatten(self.treedef, leaves)

    def nested(self, arrays: Iterable[Any]) -> Any:
        """These arrays in the structure of its value, with nothing where that holds no array."""
        inside = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(inside) if s is _ARRAY else None for s in self.statics])

    def parts(self, raw: Any) -> list[Any] | None:
        """The arrays in a value of the Variable, or `None` if it differs in anything but its arrays."""
        values, treedef = jax.tree.flatten(raw)
        if treedef != self.treedef:
            return None
        for value, static in zip(values, self.statics, strict=True):
            if is_array(value) != (static is _ARRAY) or (static is not _ARRAY and value != static):
                return None
        return [value for value, static in zip(values, self.statics, strict=True) if static is _ARRAY]

    @property
    def sketch(self) -> str:
        """The structure of its value, for messages."""
        return sketch(self.value(self.shapes))


_LEAF = jax.tree.structure(0)


class _Array:
    def __repr__(self) -> str:
        return "array"


def sketch(raw: Any) -> str:
    """A value with `array` in the place of each array."""
    return str(jax.tree.map(lambda leaf: _Array() if is_array(leaf) or _is_shape(leaf) else leaf, raw))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a Variable's value is carried by programs as an array."""
    if isinstance(leaf, jax.Array):
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMmV" or jnp.issubdtype(leaf.dtype, np.number)
    return isinstance(leaf, bool | int | float | complex)


def raw_value(leaf: Any) -> Any:
    """What a graph leaf holds: a Variable's raw value, or the bare array itself."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def role_of(leaf: Any, paths: Sequence[graph.Path], trainable: Any) -> Role:
    """The role of one graph leaf under a `trainable` filter."""
    if isinstance(leaf, nnx.RngState):
        return "rngs"
    if not isinstance(leaf, nnx.Variable):
        return "stats"
    if isinstance(trainable, Parts):
        roles: list[Role] = [role_of(leaf, paths, each) for each in trainable.each]
        return "params" if "params" in roles else roles[0]
    eligible = isinstance(leaf, nnx.Param) or names_type_of(trainable, leaf)
    if eligible and matches(trainable, paths, leaf):
        return "params"
    return "frozen" if isinstance(leaf, nnx.Param) else "stats"


def takers_of(leaf: Any, paths: Sequence[graph.Path], trainable: Any) -> tuple[int, ...]:
    """Which of several optimizers would train one graph leaf."""
    filters = trainable.each if isinstance(trainable, Parts) else ()
    return tuple(i for i, each in enumerate(filters) if role_of(leaf, paths, each) == "params")


class Layout:
    """A module's leaves as one flat list of arrays: who is where, and the way to and from modules and States.

    Attributes:
        slots: One per graph leaf, in the graphdef's order.
        size: Number of arrays in the flat list.
    """

    def __init__(self, slots: Sequence[Slot]):
        self.slots = tuple(slots)
        self.size = self.slots[-1].stop if self.slots else 0
        self._paths = [slot.path for slot in self.slots]
        self._views = {role: View([slot for slot in self.slots if slot.role == role]) for role in ROLES}

    @classmethod
    def of(cls, module: nnx.Module, trainable: Any = nnx.Param) -> Layout:
        """The layout of a module as it is now, under a `trainable` filter."""
        _, leaves = graph.flatten(module)
        aliases = graph.leaf_paths(module)
        check_edits(trainable, module, [path for paths in aliases.values() for path in paths])
        slots: list[Slot] = []
        start = 0
        for path, leaf in leaves:
            paths = tuple(aliases.get(id(leaf), [path])) if isinstance(leaf, nnx.Variable) else (path,)
            values, treedef = jax.tree.flatten(raw_value(leaf))
            statics = tuple(_ARRAY if is_array(value) else value for value in values)
            shapes = tuple(_shape(value) for value in values if is_array(value))
            impls = tuple(keys.implementation(value) for value in values if is_array(value))
            kind = type(leaf) if isinstance(leaf, nnx.Variable) else jax.Array
            role, takers = role_of(leaf, paths, trainable), takers_of(leaf, paths, trainable)
            slots.append(Slot(path, paths, kind, role, start, treedef, statics, shapes, impls, takers))
            start += len(shapes)
        return cls(slots)

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each array in the flat list."""
        return [shape for slot in self.slots for shape in slot.shapes]

    def positions(self, role: Role) -> list[int]:
        """Positions in the flat list of the arrays that play a role."""
        return [i for slot in self.slots if slot.role == role for i in range(slot.start, slot.stop)]

    def select(self, predicate: Callable[[Slot], bool]) -> list[Slot]:
        """The slots that satisfy a predicate."""
        return [slot for slot in self.slots if predicate(slot)]

    def arrays_of(self, module: nnx.Module, *, step: str, given: Sequence[Any] | None = None) -> list[Any]:
        """The flat list of a module's arrays after a step ran on it.

        Args:
            module: A module merged from this layout.
            step: The hook that ran, for messages.
            given: The flat list it was merged with, where its dtypes are not the layout's.

        Raises:
            StateError: A Variable was added, removed, or changed its structure or shape.
        """
        _, leaves = graph.flatten(module)
        _check_same_leaves(self._paths, [path for path, _ in leaves], step)
        arrays: list[Any] = []
        for slot, (_, leaf) in zip(self.slots, leaves, strict=True):
            values = slot.parts(raw_value(leaf))
            if values is None:
                raise StateError(
                    f"{step} changed the structure of the value of `{slot.name}` ({slot.type.__name__}):\n"
                    f"    was {slot.sketch}\n    is  {sketch(raw_value(leaf))}\n"
                    "A compiled step is built for one structure. Fix: keep its keys, types and plain entries the same."
                )
            expected = slot.shapes if given is None or any(slot.impls) else given[slot.start : slot.stop]
            arrays.extend(_like(value, like, slot.name, step) for value, like in zip(values, expected, strict=True))
        return arrays

    def merge(self, graphdef: nnx.GraphDef, arrays: Sequence[Any]) -> Any:
        """A module with these arrays in it."""
        return graph.merge(graphdef, [slot.value(arrays[slot.start : slot.stop]) for slot in self.slots])

    def state(self, role: Role, arrays: Sequence[Any]) -> nnx.State:
        """The arrays of a role as a pure `nnx.State` (arrays as leaves), the form Optax is given."""
        return self._views[role].state(arrays)

    def put(self, role: Role, arrays: Sequence[Any], state: nnx.State) -> list[Any]:
        """A copy of the flat list in which the arrays of a role come from a pure State."""
        return self._views[role].put(arrays, state)

    def names(self, role: Role) -> list[str]:
        """The dotted path of each leaf of `state(role, ...)`, in the order of its leaves."""
        return self._views[role].names

    def view(self, role: Role) -> View:
        """The arrays of a role, to look at."""
        return self._views[role]


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    aval = jax.eval_shape(jnp.asarray, value) if not isinstance(value, jax.Array) else value
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _like(value: Any, shape: Any, name: str, step: str) -> Any:
    """The value as the program's next call expects it: same shape and dtype, never weakly typed."""
    if jnp.shape(value) != shape.shape:
        raise StateError(
            f"{step} changed the shape of `{name}` from {shape.shape} to {jnp.shape(value)}.\n"
            "A compiled step is built for one shape. Fix: write a value of the Variable's own shape."
        )
    if keys.is_key(shape):
        return keys.data_of(value)
    return jax.lax.convert_element_type(value, shape.dtype)


def _check_same_leaves(expected: Sequence[graph.Path], found: Sequence[graph.Path], step: str) -> None:
    if list(expected) == list(found):
        return
    added = [graph.path_name(path) for path in found if path not in set(expected)]
    removed = [graph.path_name(path) for path in expected if path not in set(found)]
    changes = [
        f"    {verb} {', '.join(names)}" for verb, names in (("added", added), ("removed", removed)) if names
    ] or ["    reordered or re-tied Variables"]
    raise StateError(
        f"{step} changed which Variables the module has:\n" + "\n".join(changes) + "\n"
        "A compiled step carries a fixed set of Variables; this one would be lost after the step.\n"
        "Fix: create Variables in `__init__` (or `setup`), and use `self.log` or a return value instead of `self.sow`."
    )
