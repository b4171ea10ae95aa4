"""Whether something traced is hidden in a plain value: a closure, a partial, an object. It would outlive its trace."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.core
from flax import nnx

_DEEPEST = 8


def holds_tracer(value: Any) -> bool:
    """Whether a value, or what it refers to by closures, arguments, attributes and items, is traced."""
    return _search(value, 0, set())


def _search(value: Any, depth: int, seen: set[int]) -> bool:
    if isinstance(value, jax.core.Tracer):
        return True
    if id(value) in seen or depth > _DEEPEST or isinstance(value, str | bytes | int | float | type | types.ModuleType):
        return False
    seen.add(id(value))
    return any(_search(part, depth + 1, seen) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, nnx.Variable | jax.Array):
        return ()
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
