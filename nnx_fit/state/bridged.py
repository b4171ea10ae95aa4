"""Linen modules in NNX (`nnx.bridge.ToNNX`): what the wrapper and the module in it say of themselves.

The wrapper takes any argument and has every collection of the Linen module as Variables: its Linen module's method is
what tells the call flags, and its Variables tell which collections a training step has to let Linen write.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx import variablelib

from nnx_fit.state import graph

Bridged = nnx.bridge.ToNNX

# What the wrapper takes for its own; it hands every other attribute to Linen as a Variable.
_OWN = "to_nnx__"


def is_bridged(node: Any) -> bool:
    """Whether a node of a graph is a Linen module in NNX."""
    return isinstance(node, Bridged)


def own_name(name: str) -> str:
    """The name under which an attribute can be put on a wrapper without being taken for one of Linen's."""
    return _OWN + name.lstrip("_")


def linen_of(layer: Any) -> Any:
    """The Linen module in a wrapper."""
    return layer.to_nnx__module


def name_of(layer: Any) -> str:
    """The name of a layer's class as its author wrote it: that of the Linen module for a wrapper."""
    return type(linen_of(layer) if is_bridged(layer) else layer).__name__


def method_of(layer: Any, method: Any = None) -> Any:
    """The function of the Linen module that a call of its wrapper runs.

    Args:
        layer: The wrapper.
        method: What the call was given as `method`: a function, a name, or `None` for `__call__`.
    """
    if method is None or isinstance(method, str):
        return getattr(type(linen_of(layer)), method or "__call__", None)
    return method


def has_field(layer: Any, name: str) -> bool:
    """Whether the Linen module has a value of its own for a flag; Linen's layers refuse a second one."""
    return isinstance(getattr(linen_of(layer), name, None), bool)


def collections_of(layer: Any) -> list[str]:
    """The Linen collections that a wrapper holds, parameters aside: what a call may write without adding anything."""
    leaves = [leaf for path, leaf in graph.flatten(layer)[1] if not str(path[0]).startswith(_OWN)]
    kinds = {type(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}
    return sorted({variablelib.variable_name_from_type(kind) for kind in kinds} - {"params"})
