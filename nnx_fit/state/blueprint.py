"""`Blueprint`: what programs are built from, and whether the module still looks like it.

Taking graphdefs walks the whole module several times, which is too much for every epoch, let alone for every batch that
a hook sees. What costs little is to compare who holds what with who held what: identities, and copies of the lists,
dicts and sets that may be changed in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from nnx_fit.state import graph
from nnx_fit.state.layout import Layout
from nnx_fit.state.modes import marked, set_mode
from nnx_fit.state.reads import MODES, plain_attributes

_MISSING = object()


class Blueprint:
    """A module as programs are built from it.

    Args:
        module: The live module.
        trainable: NNX filter of what trains.

    Attributes:
        graphdefs: The graphdef in train mode (`True`) and in eval mode (`False`).
        layout: Where each leaf is in the flat list of arrays.
    """

    def __init__(self, module: Any, trainable: Any):
        self._module = module
        self._trainable = trainable
        self.graphdefs = _both_graphdefs(module)
        self.layout = Layout.of(module, trainable)
        self._plain = plain_attributes(module)
        self._nodes = [_Node(path, node) for path, node in graph.modules(module, object) if _holds(node)]
        self._metadata = [(leaf, leaf.get_metadata()) for leaf in _variables(module)]
        self._looked_again = False

    def intact(self, trainable: Any) -> bool:
        """Whether nothing but values has changed since; it may say no where nothing that matters has."""
        return (
            not self._looked_again
            and trainable == self._trainable
            and all(node.same() for node in self._nodes)
            and all(_equal(variable.get_metadata(), before) for variable, before in self._metadata)
        )

    def changed(self) -> list[graph.Path]:
        """The plain attributes that differ from what they were."""
        return [path for path, value in plain_attributes(self._module).items() if self._differs(path, value)]

    def newly_changed(self) -> list[graph.Path]:
        """`changed`, of the nodes that are not as they were when this was asked before: it costs little each time."""
        paths = []
        for place, node in enumerate(self._nodes):
            if not node.same():
                self._looked_again = True
                self._nodes[place] = _Node(node.path, node.node)
                own = graph.static_attributes(node.node) if isinstance(node.node, nnx.Module) else {}
                paths += [
                    (*node.path, name)
                    for name, value in own.items()
                    if name not in MODES and self._differs((*node.path, name), value)
                ]
        return paths

    def _differs(self, path: graph.Path, value: Any) -> bool:
        return not _equal(value, self._plain.get(path, _MISSING))


class _Node:
    """What a node of the graph held when this was made."""

    def __init__(self, path: graph.Path, node: Any):
        self.path = path
        self.node = node
        self._held = _held(node)
        self._keys = tuple(self._held)
        self._values = tuple(self._held.values())
        self._copies = [(value, value.copy()) for value in self._values if isinstance(value, list | dict | set)]

    def same(self) -> bool:
        """Whether it holds the same, but for values of arrays and what the Trainer itself sets."""
        held = self._held = _held(self.node) if isinstance(self.node, list | tuple) else self._held
        identical = (
            len(held) == len(self._keys)
            and all(map(operator.is_, held.values(), self._values))
            and all(map(operator.eq, held, self._keys))
        )
        if not identical and not _alike(held, dict(zip(self._keys, self._values, strict=True))):
            return False
        return all(_equal(value, copy) for value, copy in self._copies)


def _held(node: Any) -> dict[Any, Any]:
    if isinstance(node, nnx.Pytree):
        return vars(node)
    return node if isinstance(node, dict) else dict(enumerate(node))


def _holds(node: Any) -> bool:
    return isinstance(node, nnx.Pytree | dict | list | tuple) and not isinstance(node, nnx.Variable)


def _alike(new: dict[Any, Any], old: dict[Any, Any]) -> bool:
    return new.keys() - MODES == old.keys() - MODES and all(
        value is old[key] or _interchangeable(key, value, old[key]) for key, value in new.items() if key not in MODES
    )


def _interchangeable(key: Any, new: Any, old: Any) -> bool:
    """Whether two values of an attribute are the same in all that a graphdef knows of them."""
    if key == "_pytree__nodes":  # Flax's record of which attributes are data
        return {k: v for k, v in new.items() if k not in MODES} == {k: v for k, v in old.items() if k not in MODES}
    return isinstance(new, jax.Array | np.ndarray) and isinstance(old, jax.Array | np.ndarray)


def _variables(module: Any) -> Iterator[nnx.Variable]:
    return (leaf for _, leaf in graph.flatten(module)[1] if isinstance(leaf, nnx.Variable))


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


def _equal(new: Any, old: Any) -> bool:
    if new is old:
        return True
    try:
        return bool(new == old)
    except Exception:  # an object whose comparison is none: another object is another value
        return False
