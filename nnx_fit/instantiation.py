"""`instantiate`: objects from a config, as `hydra.utils.instantiate` makes them, without its costs.

Hydra finds the target and applies its policy on what may be a target; the call itself is made here. So a `_partial_`
is a plain `functools.partial` (a call of Hydra's costs several hundred microseconds), lists and dicts arrive as plain
ones, arguments keep their identity, and an exception in a constructor is raised as it is, with the user's frames.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.utils
from omegaconf import OmegaConf

_KEYWORDS = frozenset({"_target_", "_args_", "_partial_", "_recursive_", "_convert_"})


def instantiate(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Builds the object that a config describes.

    Args:
        config: A mapping (plain, `DictConfig` or structured) with `_target_`, the dotted name of a class or function,
            and its arguments, which may themselves be such mappings. `_partial_: true` gives a `functools.partial`,
            `_args_` positional arguments, `_recursive_: false` leaves nested mappings as they are. A mapping or list
            without `_target_` is built element by element; `None` gives `None`.
        *args: Positional arguments, in place of `_args_`.
        **kwargs: Arguments that win over those in the config, handed over untouched.

    Returns:
        The object.

    Raises:
        hydra.errors.InstantiationException: The target cannot be found or is not allowed.

    Example:
        >>> from nnx_fit import instantiate
        >>> instantiate({"_target_": "datetime.timedelta", "hours": 1}, minutes=30).total_seconds()
        5400.0
    """
    if config is None:
        return None
    if not OmegaConf.is_config(config):
        config = OmegaConf.create(config) if isinstance(config, (dict, list)) else OmegaConf.structured(config)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    if isinstance(plain, dict) and "_target_" in plain:
        return _build_target(plain, args, kwargs)
    return _build(plain, recursive=True)


def locate(target: Any) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        hydra.errors.InstantiationException: It cannot be found or is not allowed.
    """
    return hydra.utils.instantiate({"_target_": target, "_partial_": True}).func


def _build(node: Any, *, recursive: bool) -> Any:
    if isinstance(node, Mapping):
        if recursive and "_target_" in node:
            return _build_target(node, (), {})
        return {key: _build(value, recursive=recursive) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        return [_build(value, recursive=recursive) for value in node]
    return node


def _build_target(node: Mapping[Any, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    target = locate(node["_target_"])
    recursive = node.get("_recursive_", True)
    partial = node.get("_partial_", False)
    settings = {key: value for key, value in node.items() if key not in _KEYWORDS and key not in kwargs}
    if partial:  # what is missing may still come with the call
        settings = {key: value for key, value in settings.items() if not _is_missing(value)}
    arguments = {key: _build(value, recursive=recursive) for key, value in settings.items()}
    positional = args or [_build(value, recursive=recursive) for value in node.get("_args_", ())]
    if partial:
        return functools.partial(target, *positional, **arguments, **kwargs)
    return target(*positional, **arguments, **kwargs)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == "???"
