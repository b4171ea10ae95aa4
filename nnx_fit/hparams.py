"""`hparams`: a module's constructor arguments, recorded by themselves and kept outside of its graph."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx


class Hyperparameters(dict[str, Any]):
    """Constructor arguments by name, readable as items and as attributes.

    Attributes:
        not_recorded: Names of arguments that were given and are no plain values, `nnx.Rngs` aside.
    """

    not_recorded: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}") from None


_HPARAMS: weakref.WeakKeyDictionary[Any, Hyperparameters] = weakref.WeakKeyDictionary()


class RecordsArguments(type(nnx.Module)):
    """Records a module's constructor arguments before its `__init__` runs."""

    def _pytree_meta_construct(cls, self: Any, *args: Any, **kwargs: Any) -> None:
        _HPARAMS[self] = _constructor_arguments(cls, args, kwargs)
        super()._pytree_meta_construct(self, *args, **kwargs)


def hparams_of(module: Any) -> Hyperparameters:
    """What a module was made with, as far as it is plain values; empty where nobody knows."""
    return _HPARAMS.get(module, Hyperparameters())


def set_hparams(module: Any, hparams: Hyperparameters) -> None:
    """Says what a module was made with, which a copy of another one cannot know."""
    _HPARAMS[module] = hparams


def _constructor_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hyperparameters:
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return Hyperparameters()  # the constructor itself raises the right error
    given = set(bound.arguments)
    bound.apply_defaults()
    found = Hyperparameters()
    left_out: list[str] = []
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and not value:
            continue
        items = value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
        for key, item in items:
            if (plain := _plain(item)) is not _NOT_PLAIN:
                found[key] = plain
            elif name in given and item is not signature.parameters[name].default and not isinstance(item, nnx.Rngs):
                left_out.append(key)
    found.not_recorded = tuple(left_out)
    return found


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return (
            _NOT_PLAIN
            if any(item is _NOT_PLAIN for item in items)
            else (list if isinstance(value, list) else tuple)(items)
        )
    if isinstance(value, Mapping):
        mapped = {key: _plain(item) for key, item in value.items()}
        plain = all(isinstance(key, str) and item is not _NOT_PLAIN for key, item in mapped.items())
        return mapped if plain else _NOT_PLAIN
    return _NOT_PLAIN
