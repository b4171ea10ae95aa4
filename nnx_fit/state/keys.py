"""Typed PRNG keys as plain arrays, the form in which programs take them.

A compiled call with a typed key among its arguments leaves JAX's fast path: it costs several times as much on the
host. So the flat list holds a key's data, and steps and users see the key.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def is_key(value: Any) -> bool:
    """Whether a value (an array, or a shape with a dtype) is a typed PRNG key."""
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def data_of(value: Any) -> Any:
    """A key's data, uint32; any other array as it is."""
    return jax.random.key_data(value) if is_key(value) else value


def implementation(value: Any) -> Any | None:
    """The generator of a typed key; `None` for any other value."""
    return jax.random.key_impl(value) if isinstance(value, jax.Array) and is_key(value) else None


def key_of(data: Any, impl: Any | None) -> Any:
    """The typed key of some data; with no generator the array as it is."""
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)
