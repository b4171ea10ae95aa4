"""Looking into an Optax state: the hyperparameters in it, and the plateaus that a monitored metric drives.

Optax nests states as it nests transformations; what is looked for may be anywhere in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ReduceLROnPlateauState

# A count that no accumulation of `reduce_on_plateau` ever reaches by adding one: its scale then stays as it is.
_NEVER = -2


class Driven(NamedTuple):
    """The state of an optimizer whose plateaus are driven by a metric.

    Attributes:
        state: Optax's own.
        value: The metric's latest value, float32 scalar.
        fresh: Whether the plateaus have not seen it yet, bool scalar.
        shown: Number of values the metric has had so far, int32 scalar.
    """

    state: Any
    value: jax.Array
    fresh: jax.Array
    shown: jax.Array


class Counted(NamedTuple):
    """The state of an optimizer that a step updates as often as it likes.

    Attributes:
        state: Its own.
        updates: Number of its updates, int32 scalar.
    """

    state: Any
    updates: jax.Array


def bare(state: Any) -> Any:
    """Optax's own state."""
    while isinstance(state, Counted | Driven):
        state = state.state
    return state


def driven(state: Any) -> Driven:
    """A state that waits for its first value."""
    return Driven(state, jnp.float32(jnp.inf), jnp.bool_(False), jnp.int32(0))


def shown(state: Any, value: float, count: int) -> Any | None:
    """A driven optimizer's state with the newest value of its metric; `None` if it has been shown that one before.

    Args:
        state: The state.
        value: The value.
        count: Number of values that the metric has had.
    """
    if isinstance(state, Counted):
        inner = shown(state.state, value, count)
        return None if inner is None else state._replace(state=inner)
    if int(state.shown) == count:
        return None
    return Driven(state.state, jnp.float32(value), jnp.bool_(True), jnp.int32(count))


def held_plateaus(state: Any, fresh: jax.Array) -> Any:
    """A state whose plateaus take no notice of the next update unless there is something new to see."""
    return _map_plateaus(lambda p: p._replace(count=jnp.where(fresh, p.count, jnp.int32(_NEVER))), state)


def kept_plateaus(new: Any, old: Any, fresh: jax.Array) -> Any:
    """A new state with the plateaus of an old one, unless there was something new to see."""
    before = iter(list(_plateaus(old)))
    return _map_plateaus(lambda p: jax.tree.map(lambda a, b: jnp.where(fresh, a, b), p, next(before)), new)


def has_plateau(state: Any) -> bool:
    """Whether `reduce_on_plateau` is anywhere in an optimizer."""
    return any(True for _ in _plateaus(state))


def plateau_scale(state: Any) -> Any:
    """What the plateaus of an optimizer have reduced its updates to, a factor."""
    scale: Any = 1.0
    for plateau in _plateaus(state):
        scale = scale * plateau.scale
    return scale


def injected(state: Any) -> dict[str, Any]:
    """The hyperparameters that `optax.inject_hyperparams` keeps in a state, by name.

    Of two with one name the outer and earlier one is meant.
    """
    found: dict[str, Any] = {}
    for holder in _holders(state):
        found = {**holder.hyperparams, **found}
    return found


def scheduled(state: Any, name: str) -> bool:
    """Whether a schedule sets an injected hyperparameter at every update."""
    first = next(holder for holder in _holders(state) if name in holder.hyperparams)
    return name in getattr(first, "hyperparams_states", {})


def applied(state: Any) -> Any | None:
    """Number of updates that `optax.MultiSteps` has let through; `None` where every one counts."""
    for node in jax.tree.leaves(state, is_leaf=lambda each: isinstance(each, optax.MultiStepsState)):
        if isinstance(node, optax.MultiStepsState):
            return node.gradient_step
    return None


def with_injected(state: Any, name: str, value: Any) -> Any:
    """A state in which an injected hyperparameter has another value, in the dtype it had."""
    first = next(holder for holder in _holders(state) if name in holder.hyperparams)

    def changed(node: Any) -> Any:
        if not _is_holder(node):
            return node
        if node is not first:
            return node._replace(inner_state=jax.tree.map(changed, node.inner_state, is_leaf=_is_holder))
        old = node.hyperparams[name]
        # A copy: the next step donates it, and the value may be an array of the caller's.
        new = jnp.broadcast_to(jnp.array(value, old.dtype), old.shape)
        return node._replace(hyperparams={**node.hyperparams, name: new})

    return jax.tree.map(changed, state, is_leaf=_is_holder)


def _is_holder(node: Any) -> bool:
    return isinstance(getattr(node, "hyperparams", None), Mapping) and hasattr(node, "_replace")


def _holders(state: Any) -> Iterator[Any]:
    for node in jax.tree.leaves(state, is_leaf=_is_holder):
        if _is_holder(node):
            yield node
            yield from _holders(node.inner_state)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, ReduceLROnPlateauState)


def _plateaus(state: Any) -> Iterator[ReduceLROnPlateauState]:
    return (node for node in jax.tree.leaves(state, is_leaf=_is_plateau) if _is_plateau(node))


def _map_plateaus(function: Any, state: Any) -> Any:
    return jax.tree.map(lambda node: function(node) if _is_plateau(node) else node, state, is_leaf=_is_plateau)
