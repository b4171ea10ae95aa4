"""`Blueprint`: what programs are built from, and whether the module still looks like it.

Taking graphdefs walks the whole module several times, which is too much for every epoch, let alone for every batch that
a hook sees. What costs little is to compare who holds what with who held what: identities, and copies of the lists,
dicts and sets that may be changed in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx

from nnx_fit.state import graph
from nnx_fit.state.layout import ROLES, Layout
from nnx_fit.state.modes import marked, set_mode
from nnx_fit.state.reads import MODES, copied, plain_attributes

_MISSING = object()
_RECORD = "_pytree__nodes"  # Flax's record of which attributes are data


class Blueprint:
    """A module as programs are built from it.

    Args:
        module: The live module.
        trainable: NNX filter of what trains.

    Attributes:
        trainable: That filter.
        graphdefs: The graphdef in train mode (`True`) and in eval mode (`False`).
        layout: Where each leaf is in the flat list of arrays.
    """

    def __init__(self, module: Any, trainable: Any):
        self.trainable = trainable
        self.graphdefs = _both_graphdefs(module)
        self.layout = Layout.of(module, trainable)
        self._module = module
        self._plain = plain_attributes(module)
        self._nodes = [_Node(path, node) for path, node in graph.modules(module, object) if _holds(node)]
        self._leaves = _leaves(module)
        self._variables = [leaf for leaf in self._leaves if isinstance(leaf, nnx.Variable)]
        self._metadata = [variable.get_metadata() for variable in self._variables]
        self._looked_again = False

    def intact(self, trainable: Any) -> bool:
        """Whether nothing but values has changed since; it may say no where nothing that matters has."""
        return (
            not self._looked_again
            and _equal(trainable, self.trainable)
            and all(not node.changes() for node in self._nodes)
            and all(map(_equal, (variable.get_metadata() for variable in self._variables), self._metadata))
        )

    def changed(self) -> list[graph.Path]:
        """The plain attributes that differ from what they were."""
        return [path for path, value in plain_attributes(self._module).items() if self._differs(path, value)]

    def newly_changed(self) -> tuple[list[graph.Path], bool]:
        """What changed since this was asked before; it costs little each time.

        Returns:
            The plain attributes that differ from what they were at first, and whether anything else changed that leaves
            the module with the Variables it had: where layers are, an attribute of something that is no layer.
        """
        paths, more = [], False
        for place, node in enumerate(self._nodes):
            names = node.changes()
            if names:
                self._looked_again = True
                self._nodes[place] = _Node(node.path, node.node)
                own = graph.static_attributes(node.node) if graph.is_layer(node.node) else {}
                more = more or not names <= own.keys() | {_RECORD}
                changed = [(*node.path, name) for name in names & own.keys() if name not in MODES]
                paths += [path for path in changed if self._differs(path, own[path[-1]])]
        return paths, more and _owned(_leaves(self._module)) == _owned(self._leaves)

    def differs(self, now: Blueprint, besides: Sequence[graph.Path]) -> bool:
        """Whether programs of the module as it is now are others than those built from this.

        Args:
            now: The module as it is now.
            besides: Plain attributes that do not count.
        """
        same_variables = len(now._variables) == len(self._variables) and all(
            map(operator.is_, now._variables, self._variables)
        )
        if not same_variables or now.layout.slots != self.layout.slots:
            return True
        if _same_graphdefs(now.graphdefs, self.graphdefs):
            return False
        # Equal ones as well: a graphdef would tell one NaN from another.
        equal = [path for path, value in now._plain.items() if path in self._plain and not self._differs(path, value)]
        with self._as_before([*besides, *equal]):
            return not _same_graphdefs(_both_graphdefs(self._module), self.graphdefs)

    def describe(self, now: Blueprint) -> str:
        """What differs between this and the module as it is now, for a message."""
        roles = [{slot.name: slot.role for slot in layout.slots} for layout in (self.layout, now.layout)]
        changes = [
            f"{verb} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
            for verb, names in (
                ("added", [name for name in roles[1] if name not in roles[0]]),
                ("removed", [name for name in roles[0] if name not in roles[1]]),
                *(
                    (f"{role} now has", [n for n, r in roles[1].items() if r == role and roles[0].get(n, role) != role])
                    for role in ROLES
                ),
            )
            if names
        ]
        if changes:
            return ", ".join(changes)
        keys_ = [
            new_key
            for (_, a), (new_key, b) in zip(
                self.graphdefs[True].attributes, now.graphdefs[True].attributes, strict=False
            )
            if a != b
        ]
        own = [str(key) for key in keys_ if not str(key).startswith("_pytree__")]
        return f"attribute {', '.join(dict.fromkeys(own))}" if own else "its structure"

    def _differs(self, path: graph.Path, value: Any) -> bool:
        return not _equal(value, self._plain.get(path, _MISSING))

    @contextmanager
    def _as_before(self, paths: Sequence[graph.Path]) -> Iterator[None]:
        """Gives plain attributes the values they had, while the block runs."""
        nodes = {node.path: node.node for node in self._nodes}
        owners = [nodes[path[:-1]] for path in paths if path[:-1] in nodes]
        saved = [(owner, dict(vars(owner))) for owner in owners]
        try:
            for path in paths:
                if path[:-1] in nodes:
                    before = self._plain.get(path, _MISSING)
                    if before is _MISSING:
                        graph.forget_attribute(nodes[path[:-1]], path[-1])
                    else:
                        object.__setattr__(nodes[path[:-1]], path[-1], before)
            yield
        finally:
            for owner, held in saved:
                vars(owner).clear()
                vars(owner).update(held)


class _Node:
    """What a node of the graph held when this was made."""

    def __init__(self, path: graph.Path, node: Any):
        self.path = path
        self.node = node
        self._held = _held(node)
        self._keys = tuple(self._held)
        self._values = tuple(self._held.values())
        self._copies = [(key, value, copied(value)) for key, value in self._held.items() if _is_plain_container(value)]

    def changes(self) -> set[Any]:
        """Names of what is different now, but for values of arrays and what the Trainer itself sets."""
        held = self._held = _held(self.node) if isinstance(self.node, list | tuple) else self._held
        changed = {key for key, value, copy in self._copies if not _equal(value, copy)}
        identical = (
            len(held) == len(self._keys)
            and all(map(operator.is_, held.values(), self._values))
            and all(map(operator.eq, held, self._keys))
        )
        if not identical:
            before = dict(zip(self._keys, self._values, strict=True))
            names = (held.keys() | before.keys()) - MODES
            changed |= {
                name for name in names if not _alike(name, held.get(name, _MISSING), before.get(name, _MISSING))
            }
        return changed


def _is_plain_container(value: Any) -> bool:
    """Whether a value may change in place, and is no part of the graph, whose nodes are looked at one by one."""
    if not isinstance(value, list | dict | set | tuple):
        return False
    leaves = jax.tree.leaves(value, is_leaf=_is_node)
    return not any(isinstance(leaf, nnx.Pytree | nnx.Variable | jax.Array | np.ndarray) for leaf in leaves)


def _held(node: Any) -> dict[Any, Any]:
    if isinstance(node, dict):
        return node
    return dict(enumerate(node)) if isinstance(node, list | tuple) else vars(node)


def _holds(node: Any) -> bool:
    if isinstance(node, nnx.Variable | jax.Array | np.ndarray):
        return False
    return isinstance(node, nnx.Pytree | dict | list | tuple) or (
        hasattr(node, "__dict__") and bool(graph.children(node))
    )


def _alike(name: Any, new: Any, old: Any) -> bool:
    """Whether two values of an attribute are the same in all that a graphdef knows of them."""
    if new is old:
        return True
    if name == _RECORD and new is not _MISSING and old is not _MISSING:
        return {k: v for k, v in new.items() if k not in MODES} == {k: v for k, v in old.items() if k not in MODES}
    if isinstance(new, list | tuple | dict) and type(new) is type(old):  # one of arrays is made anew with its values
        parts, others = (jax.tree.flatten(each, is_leaf=_is_node) for each in (new, old))
        return parts[1] == others[1] and all(map(_interchangeable, parts[0], others[0]))
    return _interchangeable(new, old)


def _interchangeable(new: Any, old: Any) -> bool:
    return new is old or (isinstance(new, jax.Array | np.ndarray) and isinstance(old, jax.Array | np.ndarray))


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _leaves(module: Any) -> list[Any]:
    return [leaf for _, leaf in graph.flatten(module)[1]]


def _owned(leaves: Sequence[Any]) -> tuple[set[int], int]:
    """Which Variables are among some leaves, and how many leaves there are."""
    return {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}, len(leaves)


def _both_graphdefs(module: Any) -> dict[bool, nnx.GraphDef]:
    found = {}
    for training in (True, False):
        saved = set_mode(module, training, module.eval_modules)
        try:
            with marked(module, training, module.eval_modules):
                found[training], _ = graph.flatten(module)
        finally:
            saved.restore()
    return found


def _same_graphdefs(new: dict[bool, nnx.GraphDef], old: dict[bool, nnx.GraphDef]) -> bool:
    return _equal(new, old) or all(_same_graphdef(new[training], old[training]) for training in new)


def _same_graphdef(new: nnx.GraphDef, old: nnx.GraphDef) -> bool:
    """Whether two graphdefs are equal, one NaN being as good as another; to a dataclass of Python 3.13 it is not."""
    return (
        len(new.attributes) == len(old.attributes)
        and _equal(new.nodes, old.nodes)
        and all(
            key == other
            and (_equal(kind, before) or _equal(getattr(kind, "value", _MISSING), getattr(before, "value", 0)))
            for (key, kind), (other, before) in zip(new.attributes, old.attributes, strict=True)
        )
    )


def _equal(new: Any, old: Any) -> bool:
    if new is old:
        return True
    try:
        return bool(new == old) or bool(new != new and old != old)  # NaN
    except Exception:  # an object whose comparison is none: another object is another value
        return False
