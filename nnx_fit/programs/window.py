"""The accumulation window: gradients and step metrics of the batches since the last update.

It is a flat list that the train program carries and donates: a weighted sum for each gradient and for the loss, the sum
of the weights (batch sizes), and the weighted sums of the step's metrics with theirs, shape `(2, capacity)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.metrics.reduction import PRESENT, VALUE


def empty_window(params: Sequence[Any], capacity: int) -> list[jax.Array]:
    """A window without batches.

    Args:
        params: The trained arrays, or their shapes.
        capacity: Number of places for metrics.
    """
    # Sums of short floats are kept in float32.
    sums = [jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32)) for param in params]
    return [*sums, jnp.zeros(()), jnp.zeros(()), jnp.zeros((2, capacity))]


def with_gradients(window: Sequence[Any], gradients: Sequence[Any], loss: Any, size: Any) -> list[jax.Array]:
    """The window with the gradients and the loss of one batch more, of `size` examples."""
    *sums, weight, metrics = window
    size = jnp.asarray(size, jnp.float32)
    pairs = zip(sums, [*gradients, loss], strict=True)
    return [*(total + one.astype(total.dtype) * size for total, one in pairs), weight + size, metrics]


def mean_gradients(window: Sequence[Any], like: Sequence[Any]) -> tuple[list[jax.Array], jax.Array]:
    """The mean gradients and loss of the window, weighted by batch size, the gradients in the dtypes of `like`."""
    *sums, loss, weight, _ = window
    return [(total / weight).astype(one.dtype) for total, one in zip(sums, like, strict=True)], loss / weight


def with_metrics(window: Sequence[Any], packed: jax.Array, places: np.ndarray, size: Any) -> list[jax.Array]:
    """The window with the metrics of one batch more.

    Args:
        window: The window.
        packed: Metrics, as by `MetricTable.pack`.
        places: Which of them belong to the batch, and not to the update; boolean, shape `(capacity,)`.
        size: Number of examples in the batch.
    """
    *rest, metrics = window
    here = packed[PRESENT] * places * jnp.asarray(size, jnp.float32)
    return [*rest, metrics + jnp.stack([jnp.where(here > 0, packed[VALUE], 0) * here, here])]


def mean_metrics(window: Sequence[Any], packed: jax.Array) -> jax.Array:
    """`packed` with each metric that the window has in it as its mean over the window."""
    values, weights = window[-1]
    logged = weights > 0
    value = jnp.where(logged, values / jnp.where(logged, weights, 1), packed[VALUE])
    return packed.at[VALUE].set(value).at[PRESENT].max(logged.astype(jnp.float32))


def emptied(window: Sequence[Any]) -> list[jax.Array]:
    """The window after an update."""
    return [jnp.zeros_like(part) for part in window]


def widened(window: Sequence[Any], capacity: int) -> list[Any]:
    """The window with room for more metrics."""
    if not window:
        return []
    *rest, metrics = window
    return [*rest, jnp.asarray(np.pad(np.asarray(metrics), ((0, 0), (0, capacity - metrics.shape[1]))))]
