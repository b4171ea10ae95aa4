"""The position of a loader, as its `get_state` gives it, in a form that JSON can hold, and back in another process."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def encoded(state: Any, loader: Any) -> Any:
    """A position as plain values.

    Args:
        state: What the loader's `get_state` gave.
        loader: The loader, for messages.

    Raises:
        ConfigurationError: It is none that can be saved.
    """
    if isinstance(state, bytes):  # grain.DataLoader
        return {"bytes": state.decode("latin-1")}
    try:
        return json.loads(json.dumps(state, default=lambda value: np.asarray(value).tolist()))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The position of the loader ({type(loader).__name__}) cannot be saved: {error}\n"
            "Fix: let its get_state() return bytes or plain values (numbers, strings, lists, dicts)."
        ) from error


def decoded(state: Any) -> Any:
    """The position that `encoded` was given."""
    return state["bytes"].encode("latin-1") if isinstance(state, dict) and set(state) == {"bytes"} else state


def here(state: Any, loader: Any) -> Any:
    """A position from another process as one of this process.

    `grain.DataLoader` describes its source by `repr`, and takes no position of a source with another one. That of a
    class without a `__repr__` has its address in it, which is another one in every process.

    Args:
        state: The position.
        loader: What is to take it.
    """
    if not isinstance(state, bytes):
        return state
    try:
        saved, mine = json.loads(state), json.loads(loader.get_state())
        same = {name: mine[name] for name, value in saved.items() if _alike(value, mine.get(name))}
    except (TypeError, ValueError, AttributeError):  # of another form, which the loader may know
        return state
    return json.dumps({**saved, **same}, indent=4).encode() if same else state


def _alike(one: Any, other: Any) -> bool:
    """Whether two descriptions differ, and in addresses only."""
    if not (isinstance(one, str) and isinstance(other, str)) or one == other:
        return False
    return _ADDRESS.sub("", one) == _ADDRESS.sub("", other)
