"""Train and eval mode by call flag: a layer whose `__call__` takes `train`, `deterministic` and the like is given it.

While a step is traced, the `__call__` of every class of the module's that has such a parameter fills in the one that
its caller did not pass. The class is left exactly as it was found. Mode attributes are `state/modes.py`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flax import nnx

from nnx_fit.state import bridged
from nnx_fit.state.graph import modules
from nnx_fit.state.modes import mark_of

# Parameter names and their value in train mode; eval mode has the opposite.
FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}

# Classes are patched for the whole process, so one trace at a time.
_TRACING = threading.RLock()


@contextmanager
def filled(module: nnx.Module, training: bool) -> Iterator[None]:
    """Fills in call flags for the mode while the block runs, in this thread only.

    Args:
        module: The module that is about to be called; its classes are the ones that are looked at.
        training: Whether the step trains.
    """
    with _TRACING:
        patched: list[tuple[type, Any]] = []
        try:
            thread = threading.get_ident()
            for cls, call, positions in _flagged_classes(module):
                patched.append((cls, call))
                type.__setattr__(cls, "__call__", _filling(call, positions, training, thread))
            if any(bridged.is_bridged(node) for _, node in modules(module)):
                call = vars(bridged.Bridged)["__call__"]
                patched.append((bridged.Bridged, call))
                type.__setattr__(bridged.Bridged, "__call__", _filling_bridged(call, training, thread))
            yield
        finally:
            for cls, call in reversed(patched):
                type.__setattr__(cls, "__call__", call)


def _flagged_classes(module: nnx.Module) -> list[tuple[type, Any, dict[str, int | None]]]:
    """The classes to patch: each with its `__call__` and the position of each flag (`None`: keyword only)."""
    found: dict[type, tuple[Any, dict[str, int | None]]] = {}
    for _, node in modules(module):
        for cls in type(node).__mro__:
            if cls in found or "__call__" not in vars(cls) or _is_flax(cls):
                continue
            call = vars(cls)["__call__"]
            if positions := _flag_positions(call):
                found[cls] = (call, positions)
    return [(cls, call, positions) for cls, (call, positions) in found.items()]


def _is_flax(cls: type) -> bool:
    return cls is object or cls.__module__.split(".")[0] == "flax"


def _flag_positions(call: Any) -> dict[str, int | None]:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return {}
    positions: dict[str, int | None] = {}
    for index, parameter in enumerate(parameters):
        if parameter.name in FLAGS and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            positions[parameter.name] = index if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else None
    return positions


def _filling(call: Any, positions: dict[str, int | None], training: bool, thread: int) -> Callable[..., Any]:
    inlined = _inlined(call)

    @functools.wraps(inlined)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it takes the place of one
        if threading.get_ident() != thread:
            return call.__get__(self)(*args, **kwargs)
        missing = {
            name: _value(self, name, training)
            for name, position in positions.items()
            if name not in kwargs and (position is None or position > len(args))
        }
        if not missing:
            return call.__get__(self)(*args, **kwargs)
        return inlined(self, *args, **kwargs, **missing)

    return __call__


def _filling_bridged(call: Any, training: bool, thread: int) -> Callable[..., Any]:
    """The same for a Linen module in NNX, whose flags are those of the Linen method that it is to call."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it takes the place of one
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        mode = _mode(self, training)
        missing: dict[str, Any] = {
            name: FLAGS[name] if mode else not FLAGS[name]
            for name, position in _flag_positions(bridged.method_of(self, kwargs.get("method"))).items()
            if name not in kwargs and (position is None or position > len(args)) and not bridged.has_field(self, name)
        }
        if mode and kwargs.get("mutable") is None and (collections := bridged.collections_of(self)):
            missing["mutable"] = collections
        return call(self, *args, **{**kwargs, **missing})

    return __call__


def _inlined(call: Any) -> Callable[..., Any]:
    """The Python function inside a jitted `__call__`: in a trace it does the same, and the flag stays a Python bool."""
    while not inspect.isfunction(call) and hasattr(call, "__wrapped__"):
        call = call.__wrapped__
    return call


def _value(layer: Any, name: str, training: bool) -> bool:
    """A layer's own attribute of the flag's name wins over the mode."""
    own = vars(layer).get(name)
    if isinstance(own, bool):
        return own
    return FLAGS[name] if _mode(layer, training) else not FLAGS[name]


def _mode(layer: Any, training: bool) -> bool:
    return vars(layer).get(mark_of(layer), training)


def flags_of(layer: nnx.Module) -> list[str]:
    """The flags that a layer's `__call__` takes."""
    return list(_flag_positions(_call_of(layer)))


def flagged_methods(layer: nnx.Module) -> list[tuple[str, str, str]]:
    """The methods other than `__call__` that take a flag: name, flag, and what to pass for it."""
    return [
        (name, flag, "self.training" if FLAGS[flag] else "not self.training")
        for cls in type(layer).__mro__
        if not _is_flax(cls) and cls.__module__.split(".")[0] != "nnx_fit"
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("__")
        for flag in _flag_positions(method)
    ]


def unknown_flags(layer: nnx.Module) -> list[str]:
    """The parameters of a layer's `__call__` with a default that is a bool, other than the flags filled in here."""
    call = _call_of(layer)
    try:
        parameters = inspect.signature(call).parameters.values() if call is not None else ()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if isinstance(p.default, bool) and p.name not in FLAGS]


def _call_of(layer: nnx.Module) -> Any:
    """The `__call__` of a layer as its class has it, or that of the Linen module in it; `None` if there is none."""
    if bridged.is_bridged(layer):
        return bridged.method_of(layer)
    return next((vars(base)["__call__"] for base in type(layer).__mro__ if "__call__" in vars(base)), None)
