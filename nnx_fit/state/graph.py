"""Walking an NNX object graph: every leaf once for its value, and along every path that leads to it.

The only file that uses Flax's graph internals (`flax.nnx.graphlib`); everything else speaks of paths and leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import numpy as np
from flax import nnx
from flax.nnx import graphlib

Path = tuple[Any, ...]


def path_name(path: Path) -> str:
    """The dotted form of a path, as users write and read it: `("net", 0, "kernel")` is `"net.0.kernel"`."""
    return ".".join(str(part) for part in path)


def flatten(module: Any) -> tuple[nnx.GraphDef, list[tuple[Path, Any]]]:
    """Splits a module into its graphdef and its leaves, each leaf once, in the graphdef's order.

    A leaf is a `Variable` or a bare array (or any other value an attribute marks as data).
    """
    graphdef, flat = graphlib.flatten(module, with_paths=True, graph=True)
    assert isinstance(flat, nnx.FlatState)
    return graphdef, list(zip(flat.paths, flat.leaves, strict=True))


def merge(graphdef: nnx.GraphDef, values: list[Any]) -> Any:
    """Builds a module from a graphdef and one raw value for each leaf, in `flatten`'s order."""
    return graphlib.unflatten(graphdef, values)


def children(node: Any) -> list[tuple[Any, Any]]:
    """The attributes or items of a node that are part of the graph, and nothing else."""
    impl = graphlib.get_node_impl(node)
    if impl is None or isinstance(node, nnx.Variable):
        return []
    return list(impl.node_dict(node).items())


def static_attributes(node: nnx.Module) -> dict[str, Any]:
    """The attributes of a module that its graphdef has as constants, Flax's own bookkeeping aside."""
    data = node._pytree__nodes
    return {
        name: value
        for name, value in vars(node).items()
        if not name.startswith("_pytree__")
        and not data.get(name, False)
        and not (not node._pytree__is_pytree and _holds_array(value))
        and not (isinstance(value, nnx.Pytree | nnx.Variable | jax.Array | np.ndarray) and not _is_tracer(value))
    }


def _holds_array(value: Any) -> bool:
    """Whether a value is a dataclass or a container with arrays in it, which a node with `pytree=False` has as data."""
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))


def _is_tracer(value: Any) -> bool:
    """Whether a value is traced; set as an attribute in a step it is no data of the module, but a leak."""
    return isinstance(value, jax.core.Tracer)


def is_layer(node: Any) -> bool:
    """Whether a node is a module, or an `nnx.Pytree` that somebody wrote as one."""
    if isinstance(node, nnx.Module):
        return True
    own = type(node).__module__.split(".")[0] != "flax" and not isinstance(node, nnx.Rngs | nnx.RngStream)
    return own and isinstance(node, nnx.Pytree)


def modules(module: Any, kind: type | None = None) -> Iterator[tuple[Path, Any]]:
    """Every layer, or node of another kind, once, with the first path that leads to it, parents before children."""
    seen: set[int] = set()
    stack: list[tuple[Path, Any]] = [((), module)]
    while stack:
        path, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if is_layer(node) if kind is None else isinstance(node, kind):
            yield path, node
        stack.extend(
            ((*path, key), child) for key, child in reversed(children(node)) if not isinstance(child, nnx.Variable)
        )


def leaf_paths(module: Any) -> dict[int, list[Path]]:
    """All paths to each Variable, by the Variable's `id`: a tied Variable has several."""
    found: dict[int, list[Path]] = {}

    def visit(node: Any, path: Path, above: frozenset[int]) -> None:
        if isinstance(node, nnx.Variable):
            found.setdefault(id(node), []).append(path)
            return
        if id(node) in above:
            return
        for key, child in children(node):
            visit(child, (*path, key), above | {id(node)})

    visit(module, (), frozenset())
    return found


def forget_attribute(node: Any, name: str) -> None:
    """Takes an attribute out of a module as if it had never been set; a property has no value but leaves a record."""
    vars(node).pop(name, None)
    if name in node._pytree__nodes:
        rest = {key: kind for key, kind in node._pytree__nodes.items() if key != name}
        object.__setattr__(node, "_pytree__nodes", type(node._pytree__nodes)(rest))


def replace_array(node: Any, path: Path, value: Any) -> Any:
    """Puts a bare array at a path below `node`; returns the node, or its replacement where it is immutable."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    child = replace_array(dict(children(node))[key], rest, value)
    if isinstance(node, nnx.Pytree):
        object.__setattr__(node, str(key), child)
        return node
    if isinstance(node, list | dict):
        node[key] = child  # type: ignore[index]
        return node
    # In the order in which JAX flattens it, which need not be that of `children`.
    one_level, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    named = dict(children(node)) | {key: child}
    by_text = {str(name): value for name, value in named.items()}
    return jax.tree.unflatten(structure, [by_text[_key_text(entry[-1])] for entry, _ in one_level])


def _key_text(entry: Any) -> str:
    found = [getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)]
    return str(found[0] if found else entry)
