"""The structure of a pytree as plain values, so that what a program returns can be put together without its classes.

Dicts, lists, tuples and `None` come back as they are, a named tuple as one of the same name and fields, and any other
class with named parts (a dataclass, an `nnx.State`) as a dict of those.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr, tree_flatten_with_path

from nnx_fit.errors import ConfigurationError

_LEAF = "array"


def describe(tree: Any, what: str) -> tuple[Any, list[Any]]:
    """The structure of a pytree, in values that JSON can hold, and its leaves in the order of that structure.

    Args:
        tree: The pytree.
        what: What it is, for messages.

    Raises:
        ConfigurationError: A part of it is of a class whose parts have no names, or has keys that JSON does not know.
    """
    leaves: list[Any] = []
    return _described(tree, what, leaves), leaves


def rebuilt(description: Any, leaves: Iterator[Any]) -> Any:
    """The pytree of a description with these leaves."""
    if description is None:
        return None
    if description == _LEAF:
        return next(leaves)
    kind, parts = description["kind"], description["parts"]
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](rebuilt(part, leaves) for part in parts)
    named = {name: rebuilt(part, leaves) for name, part in parts}
    return named if kind == "dict" else _named_tuple(description["name"], tuple(named))(*named.values())


def leaf_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys, names and indices that lead to a leaf: the same ones whichever class holds them."""
    return tuple(str(_key(entry)) for entry in path)


def leaves_by_path(tree: Any) -> dict[tuple[str, ...], tuple[str, Any]]:
    """Each leaf of a pytree by its path, with the way Python would write that."""
    leaves, _ = tree_flatten_with_path(tree)
    return {leaf_path(path): (keystr(path), leaf) for path, leaf in leaves}


def _described(node: Any, what: str, leaves: list[Any]) -> Any:
    if node is None:
        return None
    children, treedef = tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        leaves.append(node)
        return _LEAF
    if isinstance(node, tuple) and (fields := getattr(node, "_fields", None)) is not None:
        parts = [[name, _described(child, what, leaves)] for name, child in zip(fields, node, strict=True)]
        return {"kind": "namedtuple", "name": type(node).__name__, "parts": parts}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {"kind": kind, "parts": [_described(child, what, leaves) for child in node]}
    keys = [_named(node, path[0], what) for path, _ in children]
    return {
        "kind": "dict",
        "parts": [[key, _described(child, what, leaves)] for key, (_, child) in zip(keys, children, strict=True)],
    }


def _named(node: Any, entry: Any, what: str) -> Any:
    key = _key(entry)
    if isinstance(entry, FlattenedIndexKey):
        raise ConfigurationError(
            f"{what} holds a {type(node).__qualname__}, whose class does not tell JAX the names of its parts, so that "
            "nobody could put it together without the class.\nFix: return a dict, a tuple or a dataclass registered "
            "with `jax.tree_util.register_dataclass`."
        )
    if not isinstance(key, str | int | float | bool | None):
        raise ConfigurationError(
            f"{what} holds a {type(node).__qualname__} with the key {key!r}, which cannot be written to a file.\n"
            "Fix: use strings or numbers as keys."
        )
    return key


def _key(entry: Any) -> Any:
    if isinstance(entry, DictKey | FlattenedIndexKey):
        return entry.key
    if isinstance(entry, SequenceKey):
        return entry.idx
    return entry.name if isinstance(entry, GetAttrKey) else str(entry)


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields, rename=True)
