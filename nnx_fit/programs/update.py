"""What happens to gradients before an optimizer gets them: the user's `on_gradients`, and clipping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nnx_fit.errors import ConfigurationError
from nnx_fit.options import ClipAlgorithm


def clipped(grads: Any, limit: float | None, algorithm: ClipAlgorithm) -> Any:
    """Gradients within a limit: their global norm, or each value by itself.

    Args:
        grads: Gradients, any pytree.
        limit: The largest norm or absolute value, or `None` for no limit.
        algorithm: What the limit is of.
    """
    if limit is None:
        return grads
    clip = optax.clip_by_global_norm(limit) if algorithm == "norm" else optax.clip(limit)
    return clip.update(grads, clip.init(grads))[0]


def check_gradients(owner: str, given: Any, returned: Any) -> Any:
    """The gradients that `on_gradients` returned, in the dtypes of those it was given.

    Raises:
        ConfigurationError: They are none, or differ in structure or shape.
    """
    if returned is None:
        raise ConfigurationError(
            f"{owner}.on_gradients returned nothing, so there is nothing to update with.\n"
            "Fix: end it with `return grads`."
        )
    if jax.tree.structure(returned) != jax.tree.structure(given):
        raise ConfigurationError(
            f"{owner}.on_gradients returned another structure than it was given.\n"
            "Fix: return `jax.tree.map(function, grads)`, with every gradient in its place."
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(returned), strict=True):
        if jnp.shape(new) != old.shape:
            raise ConfigurationError(
                f"{owner}.on_gradients changed the shape of the gradient {jax.tree_util.keystr(path)} from {old.shape} "
                f"to {jnp.shape(new)}. Fix: return one of the parameter's own shape."
            )
    return jax.tree.map(keep_dtype, returned, given)


def keep_dtype(new: Any, old: Any) -> Any:
    """An updated value as the next step expects it, so that its program stays the same."""
    new = jnp.asarray(new)
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return new
    return jax.lax.convert_element_type(new, old.dtype)
