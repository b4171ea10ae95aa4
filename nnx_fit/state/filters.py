"""NNX filters as this package uses them: by path prefix, over aliases, and editable.

A Variable that several paths lead to (tied weights) is one Variable: a filter that names any of its paths names it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from flax import nnx
from flax.nnx import filterlib

from nnx_fit.errors import ConfigurationError
from nnx_fit.state.graph import Path, path_name


@dataclasses.dataclass(frozen=True)
class PathPrefix:
    """Filter that matches everything at or below a dotted path: `PathPrefix("net.backbone")`."""

    prefix: str

    def __repr__(self) -> str:
        return repr(self.prefix)

    def __call__(self, path: Path, value: Any) -> bool:
        """Whether the path is the prefix or below it."""
        del value
        name = path_name(path)
        return name == self.prefix or name.startswith(self.prefix + ".")


@dataclasses.dataclass(frozen=True)
class Edited:
    """A filter with later corrections: each edit freezes or unfreezes what its own filter matches, the last one wins.

    Attributes:
        base: The filter before any edit.
        edits: Pairs of (whether to match, what it applies to), in the order they were made.
    """

    base: Any
    edits: tuple[tuple[bool, Any], ...] = ()

    def __call__(self, path: Path, value: Any) -> bool:
        """Whether the filter with its edits matches a Variable at one path."""
        return matches(self, [path], value)

    def __repr__(self) -> str:
        edits = [f"{'unfreeze' if match else 'freeze'}({_shown(selector)})" for match, selector in self.edits]
        return ", then ".join([_shown(self.base), *edits])

    def edited(self, match: bool, selectors: Sequence[Any]) -> Edited:
        """This filter with further edits."""
        return Edited(self.base, (*self.edits, *((match, selector) for selector in selectors)))


def with_edits_of(base: Any, own: Any) -> Any:
    """A filter with what was frozen and unfrozen in another one: who trains what does not undo a `freeze`."""
    if isinstance(base, Parts):
        return Parts(base.filters, getattr(own, "edits", ()))
    return Edited(hashable(base), own.edits) if isinstance(own, Edited) else base


@dataclasses.dataclass(frozen=True)
class Parts:
    """What several optimizers train: each of the filters by itself, as if there were no other.

    Attributes:
        filters: One for each optimizer.
        edits: What was frozen and unfrozen, as in `Edited`; nothing that is unfrozen goes to an optimizer that did not
            ask for it.
    """

    filters: tuple[Any, ...]
    edits: tuple[tuple[bool, Any], ...] = ()

    @property
    def each(self) -> tuple[Any, ...]:
        """The filter of each optimizer with the edits."""
        return tuple(nnx.All(one, Edited(one, self.edits)) if self.edits else one for one in self.filters)


def hashable(value: Any) -> Any:
    """The same filter in a form that can be hashed: lists and tuples become `nnx.Any`."""
    if isinstance(value, list | tuple):
        return nnx.Any(*(hashable(item) for item in value))
    return value


def check_edits(selector: Any, module: Any, paths: Sequence[Path]) -> None:
    """Refuses a path prefix that was frozen or unfrozen and leads nowhere, naming the nearest one that does.

    Args:
        selector: A filter; only one that was edited has anything to check.
        module: The module that the paths are of.
        paths: Every path of every Variable.

    Raises:
        ConfigurationError: Nothing is at a prefix or below it.
    """
    prefixes = [edit.prefix for _, edit in getattr(selector, "edits", ()) if isinstance(edit, PathPrefix)]
    if not prefixes:
        return
    known = list(dict.fromkeys(path_name(path[:end]) for path in paths for end in range(1, len(path) + 1)))
    for prefix in prefixes:
        if prefix not in known and not _exists(module, prefix):
            near = difflib.get_close_matches(prefix, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "`nnx_fit.partition(module).table()` shows all paths."
            raise ConfigurationError(
                f"freeze or unfreeze names {prefix!r}, but {type(module).__name__} has nothing there, so that nothing "
                f"would change.\n{hint}"
            )


def _exists(module: Any, prefix: str) -> bool:
    """Whether a path leads to a layer without Variables, such as an activation function in a list of layers."""
    node = module
    for part in prefix.split("."):
        try:
            node = getattr(node, part) if hasattr(node, part) else node[int(part) if part.isdigit() else part]
        except (TypeError, LookupError):
            return False
    return True


def _shown(selector: Any) -> str:
    return "..." if selector is ... else selector.__name__ if isinstance(selector, type) else repr(selector)


def matches(selector: Any, paths: Sequence[Path], value: Any) -> bool:
    """Whether a filter matches a Variable that `paths` lead to: through any of them, whatever the filter combines."""
    predicate: Any = filterlib.to_predicate(selector)
    if isinstance(predicate, Edited):
        matched = matches(predicate.base, paths, value)
        for match, edit in predicate.edits:
            if matches(edit, paths, value):
                matched = match
        return matched
    if isinstance(predicate, filterlib.Any):
        return any(matches(inner, paths, value) for inner in predicate.predicates)
    if isinstance(predicate, filterlib.All):
        return all(matches(inner, paths, value) for inner in predicate.predicates)
    if isinstance(predicate, filterlib.Not):
        return not matches(predicate.predicate, paths, value)
    return any(bool(predicate(path, value)) for path in paths)


def names_type_of(selector: Any, value: Any) -> bool:
    """Whether a filter asks for a Variable's type by name, so that it is not meant to be read as "of the Params"."""
    predicate = filterlib.to_predicate(selector)
    if isinstance(predicate, Edited):
        added = [edit for match, edit in predicate.edits if match]
        return any(names_type_of(inner, value) for inner in (predicate.base, *added))
    if isinstance(predicate, filterlib.Any | filterlib.All):
        return any(names_type_of(inner, value) for inner in predicate.predicates)
    return isinstance(predicate, filterlib.OfType) and bool(predicate((), value))
