"""Train and eval mode by attribute: `deterministic`, `use_running_average` and `training`, wherever a module has them.

The mode is set on the live module while a stage runs, so that host hooks see it, and into the graphdef that a program
is built from. What was there before comes back exactly. Call flags are `state/call_flags.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.state import bridged
from nnx_fit.state.graph import Path, forget_attribute, modules, path_name

# Attribute names and their value in train mode; eval mode has the opposite.
ATTRIBUTES = {"deterministic": False, "use_running_average": False, "training": True}

# Says in graphdefs, and only there, whether a module trains. Call flags follow it, through nested transforms too, and a
# nested `nnx.jit` that looks up its trace by graphdef cannot find the one of another mode.
MODE_MARK = "_nnx_fit_trains"

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Saved:
    """Attributes as they were before a mode was set: (owner, name, value or the marker for none)."""

    values: tuple[tuple[Any, str, Any], ...]

    def restore(self) -> None:
        """Puts every attribute back; one that the instance did not have is gone again."""
        for node, name, value in reversed(self.values):
            if value is not _MISSING:
                object.__setattr__(node, name, value)
            else:
                forget_attribute(node, name)


def set_mode(module: nnx.Module, training: bool, eval_modules: Sequence[str] = ()) -> Saved:
    """Sets train or eval mode on every module of the graph.

    Args:
        module: The root.
        training: Whether to train.
        eval_modules: Dotted path prefixes of the sub-modules that stay in eval mode.

    Returns:
        What was there before.

    Raises:
        ConfigurationError: A prefix of `eval_modules` matches no sub-module.
    """
    found = list(modules(module))
    check_prefixes(eval_modules, [path for path, _ in found])
    saved: list[tuple[Any, str, Any]] = []
    for path, node in found:
        mode = training and not kept_in_eval(path, eval_modules)
        for name, in_training in ATTRIBUTES.items():
            if _is_mode_attribute(node, name):
                before = dict(vars(node))
                setattr(node, name, in_training if mode else not in_training)
                saved.extend((node, key, before.get(key, _MISSING)) for key in _changed(before, vars(node)))
    return Saved(tuple(saved))


@contextmanager
def marked(module: nnx.Module, training: bool, eval_modules: Sequence[str] = ()) -> Iterator[None]:
    """Marks every module with the mode it runs in while a graphdef is taken."""
    nodes = [(path, node) for path, node in modules(module) if not isinstance(node, nnx.List | nnx.Dict)]
    for path, node in nodes:
        setattr(node, mark_of(node), training and not kept_in_eval(path, eval_modules))
    try:
        yield
    finally:
        for _, node in nodes:
            forget_attribute(node, mark_of(node))


def mark_of(node: Any) -> str:
    """The name of the mark on a module."""
    return bridged.own_name(MODE_MARK) if bridged.is_bridged(node) else MODE_MARK


def kept_in_eval(path: Path, eval_modules: Sequence[str]) -> bool:
    """Whether the module at a path stays in eval mode."""
    name = path_name(path)
    return any(name == prefix or name.startswith(prefix + ".") for prefix in eval_modules)


def check_prefixes(prefixes: Sequence[str], paths: Sequence[Path]) -> None:
    """Refuses a prefix that leads to no module, naming the nearest one that does."""
    names = [path_name(path) for path in paths if path]
    for prefix in prefixes:
        if prefix not in names:
            near = difflib.get_close_matches(prefix, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Sub-modules are: {', '.join(names) or 'none'}."
            raise ConfigurationError(f"eval_modules names {prefix!r}, but the module has no such sub-module.{hint}")


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names set or recorded by one assignment, which goes to another name where the class has a property."""
    names = [name for name in after if not name.startswith("_pytree__")]
    changed = [name for name in names if before.get(name, _MISSING) is not after[name]]
    records = before["_pytree__nodes"]
    return [*changed, *(name for name in after["_pytree__nodes"] if name not in records and name not in changed)]


def _is_mode_attribute(node: Any, name: str) -> bool:
    descriptor = getattr(type(node), name, None)
    if isinstance(descriptor, property):
        return descriptor.fset is not None
    return isinstance(getattr(node, name, _MISSING), bool) or (hasattr(node, name) and getattr(node, name) is None)
