"""Python side effects of a step: attributes that its code sets or fills, which a compiled step does only once.

A step's Python code runs while it is traced and then never again. What it does to plain attributes is lost with the
traced copy of the module, or stays in a list that the copy shares with the module; a traced value kept that way is
unusable. Both are seen here by comparing the attributes before and after the trace.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import jax.core
from flax import nnx

from nnx_fit.errors import StateError
from nnx_fit.state import graph
from nnx_fit.state.call_flags import FLAGS, unknown_flags
from nnx_fit.state.guard import Guard, StateWarning
from nnx_fit.state.modes import ATTRIBUTES

logger = logging.getLogger("nnx_fit")

# Attributes that say "mode" to a reader, but that nothing in NNX or here toggles.
MODE_LIKE = frozenset(FLAGS) - frozenset(ATTRIBUTES) | {"is_train", "train_mode", "eval_mode", "is_eval"}

_CONTAINERS = (list, dict, set)


class Attributes:
    """The plain attributes of every module of a graph at one time.

    Args:
        module: The root.
    """

    def __init__(self, module: nnx.Module):
        self._module = module
        self._values = _plain(module)
        self._contents = {
            key: (value, value.copy()) for key, value in self._values.items() if isinstance(value, _CONTAINERS)
        }

    def check(self, hook: str, guard: Guard) -> None:
        """Compares with the attributes as they are now; containers get their contents back.

        Raises:
            StateError: A traced value was kept in an attribute.
        """
        now = _plain(self._module)
        filled = [key for key, (value, before) in self._contents.items() if not _same(value, before)]
        set_ = [key for key, value in now.items() if value is not self._values.get(key, now)]
        leaked = [key for key in dict.fromkeys([*filled, *set_]) if _holds_tracer(now.get(key))]
        for key in filled:
            value, before = self._contents[key]
            _refill(value, before)
        if leaked:
            raise StateError(
                f"{hook} kept a traced value in `{leaked[0]}`, where it is useless: it stands for a value of the "
                "compiled step and has none of its own.\n"
                "Fix: return it from the step (on_train_batch_end gets it), log it, or hold it in an nnx.Variable."
            )
        changed = list(dict.fromkeys([*filled, *(key for key in set_ if not _equal(now[key], self._values.get(key)))]))
        if changed and guard != "off":
            warnings.warn(
                f"{hook} changed the attribute `{changed[0]}`"
                f"{f' and {len(changed) - 1} more' if changed[1:] else ''}, which has no lasting effect: the Python "
                "code of a step runs only while it is compiled.\n"
                "Fix: do it in a hook such as on_train_batch_end, or hold the value in an nnx.Variable.",
                StateWarning,
                stacklevel=2,
            )


def warn_of_untoggled_modes(module: nnx.Module) -> None:
    """Warns of attributes and arguments that look like a mode although nothing sets them."""
    for path, node in graph.modules(module):
        if type(node).__module__.split(".")[0] == "flax":
            continue
        name = graph.path_name(path) or "the module itself"
        found = [f"attribute `{key}`" for key in sorted(MODE_LIKE) if isinstance(vars(node).get(key), bool)]
        found += [f"argument `{key}` of __call__" for key in unknown_flags(type(node)) if key in MODE_LIKE]
        if found:
            warnings.warn(
                f"The layer `{name}` ({type(node).__name__}) has an {found[0]}, which looks like a mode, but nothing "
                "sets it for training or evaluation.\n"
                "Fix: call the attribute `training`, or take `train` as an argument of `__call__`; both are set for "
                "you.",
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


def _plain(module: nnx.Module) -> dict[str, Any]:
    """Every attribute that is a constant of the graphdef, private ones aside, by dotted path."""
    return {
        graph.path_name((*path, name)): value
        for path, node in graph.modules(module)
        for name, value in graph.static_attributes(node).items()
        if not name.startswith("_")
    }


def _same(value: Any, before: Any) -> bool:
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(key in before and value[key] is before[key] for key in value)
    if isinstance(value, set):
        return value == before
    return all(new is old for new, old in zip(value, before, strict=True))


def _refill(value: Any, before: Any) -> None:
    if isinstance(value, list):
        value[:] = before
    else:
        value.clear()
        value.update(before)


def _equal(new: Any, old: Any) -> bool:
    try:
        return bool(new == old)
    except Exception:  # an object whose comparison is none: another object is another value
        return False


def _holds_tracer(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tracer(item) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tracer(item) for item in value)
    return isinstance(value, jax.core.Tracer)
