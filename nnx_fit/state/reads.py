"""Which plain attributes a step reads while it is traced.

A compiled step has them as constants. When a hook sets one that the step reads, the step must be compiled again; one
that it does not read (a best score, a counter) must cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flax import nnx

from nnx_fit.state import graph
from nnx_fit.state.modes import ATTRIBUTES

_MISSING = object()

# What the Trainer itself reads of a module.
_SETTINGS = {"trainable", "eval_modules", "eval_mutable"}

# Set by the Trainer for each stage; never a change of the module.
MODES = {*ATTRIBUTES, "_training"}


def is_flax(cls: type) -> bool:
    """Whether a class is Flax's own."""
    return cls is object or cls.__module__.split(".")[0] == "flax"


@contextmanager
def recorded(module: nnx.Module, names: set[str]) -> Iterator[None]:
    """Adds to `names` every attribute that is read off an instance of the module's own classes while the block runs.

    The classes are left exactly as they were found.
    """
    patched: list[tuple[type, Any]] = []
    try:
        for cls in {type(node) for _, node in graph.modules(module) if not is_flax(type(node))}:
            patched.append((cls, vars(cls).get("__getattribute__", _MISSING)))
            type.__setattr__(cls, "__getattribute__", _recording(cls.__getattribute__, names))
        yield
    finally:
        for cls, own in reversed(patched):
            if own is _MISSING:
                type.__delattr__(cls, "__getattribute__")
            else:
                type.__setattr__(cls, "__getattribute__", own)


def _recording(read: Any, names: set[str]) -> Any:
    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807 - it takes the place of one
        if not name.startswith("__"):
            names.add(name)
        return read(self, name)

    return __getattribute__


def plain_attributes(module: nnx.Module) -> dict[graph.Path, Any]:
    """Every attribute of every module that is no node of the graph and none of Flax's own bookkeeping, by path.

    Lists, dicts and sets are copied, so that a later change in place shows.
    """
    return {
        (*path, name): copied(value)
        for path, node in graph.modules(module)
        for name, value in graph.static_attributes(node).items()
        if name not in MODES
    }


def copied(value: Any) -> Any:
    """A value whose lists, dicts and sets are its own, at every depth."""
    if isinstance(value, list | set):
        return type(value)(map(copied, value)) if type(value) in (list, set) else value.copy()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return tuple(map(copied, value)) if type(value) is tuple else value


def matters(module: nnx.Module, path: graph.Path, reads: set[str]) -> bool:
    """Whether a step may depend on the attribute at a path: it was read, or it belongs to one of Flax's layers."""
    if len(path) == 1 and path[0] in _SETTINGS:
        return True
    owner: Any = module
    for key in path[:-1]:
        owner = dict(graph.children(owner))[key]
    return is_flax(type(owner)) or path[-1] in reads
