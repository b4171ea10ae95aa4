"""Settings of a run as plain values: what a YAML file or a table of hyperparameters can hold."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Turns a nested value into dicts, lists, strings, numbers, booleans and `None`.

    NumPy and JAX scalars become Python numbers, OmegaConf containers dicts and lists, enums their names, classes and
    functions their qualified names; what is none of these becomes its `str`.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return _builtin(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, AbstractSet):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic) or (hasattr(value, "dtype") and getattr(value, "ndim", None) == 0):
        return _number(value)
    qualname = getattr(value, "__qualname__", None)
    return str(value) if qualname is None else f"{value.__module__}.{qualname}"


def yaml_text(settings: Mapping[str, Any]) -> str:
    """Nested settings as a Markdown block of YAML."""
    import yaml

    return f"```yaml\n{yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)}```"


def flatten(params: Mapping[str, Any]) -> dict[str, str | bool | float | None]:
    """Nested settings as one level of dotted names: `{"optimizer": {"name": "adam"}}` -> `{"optimizer.name": "adam"}`.

    Lists become their text, since a table of runs has one cell for each name.
    """
    return dict(_walk("", plain(params)))


def _walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from _walk(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, str(value) if isinstance(value, dict | list) else value


def _builtin(value: Any) -> Any:
    """Sheds subclasses of the built-in types (string enums, NumPy floats), which YAML cannot represent."""
    if isinstance(value, enum.Enum):
        return value.name
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _number(value: Any) -> Any:
    item = np.asarray(value).item() if np.asarray(value).dtype.kind in "biuf" else None
    if item is None:
        try:
            return float(value)
        except (TypeError, ValueError):
            return str(value)
    return item
