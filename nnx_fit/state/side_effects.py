"""Python side effects of a step: attributes that its code sets or fills, which a compiled step does only once.

A step's Python code runs while it is traced and then never again. What it does to plain attributes is lost with the
traced copy of the module, or stays in a list that the copy shares with the module; a traced value kept that way is
unusable. Both are seen here by comparing the attributes before and after the trace.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax.core
from flax import nnx

from nnx_fit.errors import StateError
from nnx_fit.state import bridged, graph
from nnx_fit.state.call_flags import FLAGS, unknown_flags
from nnx_fit.state.guard import Guard, StateWarning
from nnx_fit.state.modes import ATTRIBUTES
from nnx_fit.state.reads import MODES, is_flax

logger = logging.getLogger("nnx_fit")

# Attributes that say "mode" to a reader, but that nothing in NNX or here toggles.
MODE_LIKE = frozenset(FLAGS) - frozenset(ATTRIBUTES) | {"is_train", "train_mode", "eval_mode", "is_eval"}

_MISSING = object()

_CONTAINERS = (list, dict, set, deque)


class Attributes:
    """The plain attributes of every module of a graph at one time.

    Args:
        module: The root.
    """

    def __init__(self, module: nnx.Module):
        self._module = module
        self._owners = _owners(module)
        self._values = _plain(module)
        self._contents = {
            key: [(inner, inner.copy()) for inner in _containers(value)] for key, value in self._values.items()
        }
        self._objects = {key: (vars(value), dict(vars(value))) for key, value in self._values.items() if _opens(value)}

    def check(self, hook: str, guard: Guard) -> None:
        """Compares with the attributes as they are now; containers get their contents back.

        Raises:
            StateError: A traced value was kept in an attribute.
        """
        now = _plain(self._module)
        filled = [key for key, parts in self._contents.items() if not all(_same(*part) for part in parts)]
        set_ = [key for key, value in now.items() if value is not self._values.get(key, _MISSING)]
        leaked = [key for key in dict.fromkeys([*filled, *set_]) if _holds_tracer(now.get(key))]
        leaked += self.restore()
        if leaked:
            raise StateError(
                f"{hook} kept a traced value in `{graph.path_name(leaked[0])}`, where it is useless: it stands for a "
                "value of the compiled step and has none of its own.\n"
                "Fix: return it from the step (on_train_batch_end gets it), log it, or hold it in an nnx.Variable."
            )
        lost = [
            *(key for key in set_ if not _equal(now[key], self._values.get(key, _MISSING))),
            *(key for key in self._values if key not in now),
        ]
        owners = self._owners & _owners(self._module)
        lost = [key for key in lost if key[:-1] in owners and not self._is_made_on_demand(key)]
        changed = list(dict.fromkeys([*filled, *lost]))
        if changed and guard != "off":
            warnings.warn(
                f"{hook} changed the attribute `{graph.path_name(changed[0])}`"
                f"{f' and {len(changed) - 1} more' if changed[1:] else ''}, which has no lasting effect: the Python "
                "code of a step runs only while it is compiled.\n"
                "Fix: do it in a hook such as on_train_batch_end, or hold the value in an nnx.Variable.",
                StateWarning,
                stacklevel=2,
            )

    def restore(self) -> list[graph.Path]:
        """Gives containers their contents back and takes traced values out of objects; where those were."""
        for parts in self._contents.values():
            for value, before in parts:
                if not _same(value, before):
                    _refill(value, before)
        found = []
        for key, (held, before) in self._objects.items():
            for name in [name for name, value in held.items() if value is not before.get(name, _MISSING)]:
                if _holds_tracer(held[name]):
                    found.append((*key, name))
                    held.pop(name)
                    held.update({name: before[name]} if name in before else {})
        return found

    def _is_made_on_demand(self, key: graph.Path) -> bool:
        """Whether an attribute looks like a table that a layer makes when it needs it: private, and `None` before."""
        return str(key[-1]).startswith("_") and self._values.get(key) is None


def warn_of_untoggled_modes(module: nnx.Module) -> None:
    """Warns of attributes and arguments that look like a mode although nothing sets them."""
    for path, node in graph.modules(module):
        linen = bridged.is_bridged(node)
        if is_flax(type(node)) and not linen:
            continue
        name = graph.path_name(path) or "the module itself"
        held = vars(bridged.linen_of(node) if linen else node)
        names = MODE_LIKE | frozenset(FLAGS) if linen else MODE_LIKE
        found = [f"attribute `{key}`" for key in sorted(names) if isinstance(held.get(key), bool)]
        found += [f"argument `{key}` of __call__" for key in unknown_flags(node) if key in MODE_LIKE]
        if found:
            warnings.warn(
                f"The layer `{name}` ({bridged.name_of(node)}) has an {found[0]}, which looks like a mode, but nothing "
                "sets it for training or evaluation.\n"
                + (
                    "Fix: take `train` as an argument of the Linen module's `__call__`; it is passed for you."
                    if linen
                    else "Fix: call the attribute `training`, or take `train` as an argument of `__call__`; both are "
                    "set for you."
                ),
                StateWarning,
                stacklevel=2,
            )


def advise_on_randomness(hook: str, streams: list[str]) -> None:
    """Says that an eval step draws random numbers: allowed, and its streams are restored, but seldom meant."""
    logger.info(
        "%s draws random numbers (%s). The streams are put back afterwards, so training is not affected.",
        hook,
        ", ".join(streams),
    )


def _plain(module: nnx.Module) -> dict[graph.Path, Any]:
    """Every attribute that is a constant of the graphdef, modes aside, by path."""
    return {
        (*path, name): value
        for path, node in graph.modules(module)
        for name, value in graph.static_attributes(node).items()
        if name not in MODES
    }


def _owners(module: nnx.Module) -> set[graph.Path]:
    return {path for path, _ in graph.modules(module)}


def _containers(value: Any) -> Iterator[Any]:
    """The lists, dicts, sets and deques in a value, each once."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (*_CONTAINERS, tuple)) or id(item) in seen:
            continue
        seen.add(id(item))
        if not isinstance(item, tuple):
            yield item
        stack.extend(item.values() if isinstance(item, dict) else item)


def _opens(value: Any) -> bool:
    """Whether a value is an object of the user's that may be written to."""
    closed = isinstance(value, type | nnx.Pytree | nnx.Variable | ModuleType) or callable(value)
    return not closed and isinstance(getattr(value, "__dict__", None), dict)


def _same(value: Any, before: Any) -> bool:
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(key in before and value[key] is before[key] for key in value)
    if isinstance(value, set):
        return value == before
    return all(new is old for new, old in zip(value, before, strict=True))


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, list | deque):
        value.extend(before)
    else:
        value.update(before)


def _equal(new: Any, old: Any) -> bool:
    try:
        return bool(new == old)
    except Exception:  # an object whose comparison is none: another object is another value
        return False


def _holds_tracer(value: Any) -> bool:
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, jax.core.Tracer):
            return True
        if isinstance(item, (*_CONTAINERS, tuple)) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)
    return False
