"""The optimizers of a train program: which arrays each of them trains, their states, and their updates."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nnx_fit.errors import ConfigurationError
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.programs import opt_state as states
from nnx_fit.programs.opt_state import Counted, Driven
from nnx_fit.programs.update import keep_dtype
from nnx_fit.state import graph
from nnx_fit.state.filters import PathPrefix, matches
from nnx_fit.state.layout import Layout
from nnx_fit.state.view import View

logger = logging.getLogger("nnx_fit")


@dataclasses.dataclass(frozen=True)
class Part:
    """An optimizer and what it trains.

    Attributes:
        optimizer: The optimizer.
        view: The arrays that it trains.
        counted: Whether it counts its updates, which may be fewer than the steps.
    """

    optimizer: BoundOptimizer
    view: View
    counted: bool = False

    def init(self, arrays: Sequence[Any]) -> Any:
        """The state it starts with."""
        state = self.optimizer.tx.init(self.view.state(arrays))  # type: ignore[arg-type]
        state = state if self.optimizer.monitor is None else states.driven(state)
        return Counted(state, jnp.int32(0)) if self.counted else state

    def update(self, grads: nnx.State, state: Any, params: nnx.State, loss: Any) -> tuple[Any, Any, Any]:
        """One update.

        Args:
            grads: Gradients of what it trains.
            state: Its state.
            params: What it trains.
            loss: The loss that the gradients are of, which some transformations look at.

        Returns:
            What is added to the parameters, the new parameters, the new state; dtypes are as they were.
        """
        tx = optax.with_extra_args_support(self.optimizer.tx)
        if not self.view.slots:  # all of it is frozen: it rests, and its schedule with it
            return params, params, state
        if isinstance(state, Counted):
            updates, new_params, new = dataclasses.replace(self, counted=False).update(grads, state.state, params, loss)
            return updates, new_params, Counted(new, state.updates + 1)
        if isinstance(state, Driven):
            held = states.held_plateaus(state.state, state.fresh)
            updates, new = tx.update(grads, held, params, value=state.value)  # type: ignore[arg-type]
            new = state._replace(state=states.kept_plateaus(new, state.state, state.fresh), fresh=jnp.bool_(False))
        else:
            updates, new = tx.update(grads, state, params, value=loss)  # type: ignore[arg-type]
        treedef = jax.tree.structure(state)
        kept = [keep_dtype(a, b) for a, b in zip(treedef.flatten_up_to(new), jax.tree.leaves(state), strict=True)]
        new_params = jax.tree.map(keep_dtype, optax.apply_updates(params, updates), params)  # type: ignore[arg-type]
        return updates, new_params, jax.tree.unflatten(treedef, kept)

    def learning_rate(self, state: Any, step: Any, *, ahead: bool = False) -> Any | None:
        """The learning rate that an update had, traced; `None` where it cannot be read.

        Args:
            state: The state after the update, which holds the hyperparameters that the update used.
            step: Number of updates completed before this one.
            ahead: Whether the update is the next one, and the state the one before it.
        """
        count = states.applied(state)
        if count is None and isinstance(state, Counted):
            count = state.updates
        if count is not None:
            step = count if ahead else jnp.maximum(count - 1, 0)
        schedule = self.optimizer.schedule
        if schedule is not None:
            rate = jnp.asarray(schedule(step) if callable(schedule) else schedule, jnp.float32)
        else:
            rate = states.injected(state).get("learning_rate")
        return None if rate is None else rate * states.plateau_scale(state)


@dataclasses.dataclass(frozen=True)
class Updated:
    """What the optimizers made of gradients.

    Attributes:
        updates: What is added to the parameters.
        params: The new parameters.
        opt: The arrays of the new states.
        learning_rates: Learning rate by optimizer name, where known.
        hyperparams: Injected hyperparameters by optimizer name and name.
    """

    updates: nnx.State
    params: nnx.State
    opt: list[Any]
    learning_rates: Mapping[str, Any]
    hyperparams: Mapping[str, Mapping[str, Any]]


class Parts:
    """All optimizers of a train program.

    Args:
        optimizers: The optimizers; one without a name has its state as it is, others in a dict by name.
        layout: The layout of the module's arrays, made with the filter of these optimizers.
        counted: Whether the step decides how often each is updated. One of several may rest, so that those count, too.

    Raises:
        ConfigurationError: Two optimizers would train one Variable, or one has a plateau and no value for it.

    Attributes:
        each: One part for each optimizer, by name.
        structure: Structure of the states.
    """

    def __init__(self, optimizers: Sequence[BoundOptimizer], layout: Layout, counted: bool = False):
        self._whole = layout.view("params")
        self._size = layout.size
        if len(optimizers) == 1:
            self.each = {optimizers[0].name: Part(optimizers[0], self._whole, counted)}
        else:
            _check_disjoint(optimizers, self._whole)
            counted = True
            views = [View([slot for slot in self._whole.slots if slot.takers == (i,)]) for i in range(len(optimizers))]
            self.each = {
                optimizer.name: Part(optimizer, view, counted)
                for optimizer, view in zip(optimizers, views, strict=True)
            }
        for part in self.each.values():
            _check_state(part, jax.eval_shape(lambda part=part: part.init(_zeros(layout))))
        self.structure: Any = None

    def init(self, arrays: Sequence[Any]) -> Any:
        """The states that the optimizers start with, which `structure` is then of."""
        found = self.assembled({name: part.init(arrays) for name, part in self.each.items()})
        self.structure = jax.tree.structure(found)
        return found

    def assembled(self, states: Mapping[str, Any]) -> Any:
        """The states of all optimizers as they are kept."""
        return states[""] if list(self.each) == [""] else dict(states)

    def by_name(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The state of each optimizer from the arrays of all."""
        state = jax.tree.unflatten(self.structure, leaves)
        return {"": state} if list(self.each) == [""] else state

    def update(self, grads: nnx.State, opt: Sequence[Any], params: nnx.State, step: Any, loss: Any) -> Updated:
        """One update of every optimizer.

        Args:
            grads: Gradients of all that is trained.
            opt: The arrays of the states.
            params: All that is trained.
            step: Number of updates completed before this one.
            loss: The loss that the gradients are of.
        """
        gradients, old = (self._whole.put([None] * self._size, tree) for tree in (grads, params))
        added, new, rates = list(old), list(old), {}
        current = self.by_name(opt)
        for name, part in self.each.items():
            made = part.update(part.view.state(gradients), current[name], part.view.state(old), loss)
            added, new = part.view.put(added, made[0]), part.view.put(new, made[1])
            current[name] = made[2]
            rates[name] = part.learning_rate(made[2], step)
        return Updated(
            updates=self._whole.state(added),
            params=self._whole.state(new),
            opt=jax.tree.leaves(self.assembled(current)),
            learning_rates={name: rate for name, rate in rates.items() if rate is not None},
            hyperparams={name: states.injected(state) for name, state in current.items()},
        )


def report_uncovered(module: Any, layout: Layout, optimizers: Sequence[BoundOptimizer]) -> None:
    """Says which parameters no optimizer trains although the module would have them trained.

    Args:
        module: The module.
        layout: The layout of what the optimizers train.
        optimizers: The optimizers.
    """
    if all(optimizer.trainable is None for optimizer in optimizers):
        return
    for optimizer in optimizers:
        if optimizer.trainable is not None:
            _check_matches(module, optimizer)
    frozen = {slot.path for slot in layout.slots if slot.role == "frozen"}
    wanted = Layout.of(module, module.trainable).slots
    left = [slot.name for slot in wanted if slot.role == "params" and slot.path in frozen]
    if left:
        names = f"{', '.join(left[:5])}{f' and {len(left) - 5} more' if len(left) > 5 else ''}"
        logger.warning(
            "No optimizer trains %d parameter%s, which stay as they are: %s.", len(left), "s"[: len(left) > 1], names
        )


def _check_matches(module: Any, optimizer: BoundOptimizer) -> None:
    slots = Layout.of(module, optimizer.trainable).slots
    if any(slot.role == "params" for slot in slots):
        return
    wanted = optimizer.trainable
    first = wanted.predicates[0] if isinstance(wanted, nnx.Any) and wanted.predicates else wanted
    prefix = first.prefix if isinstance(first, PathPrefix) else None
    if prefix is not None and any(matches(first, slot.aliases, None) for slot in slots):
        hint = "What is there is no nnx.Param; Variables of another type are trained where a filter names their type."
    else:
        known = dict.fromkeys(
            graph.path_name(slot.path[:end]) for slot in slots for end in range(1, len(slot.path) + 1)
        )
        near = difflib.get_close_matches(prefix or "", list(known), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`nnx_fit.partition(module).table()` shows all paths."
    name = f" {optimizer.name!r}" if optimizer.name else ""
    raise ConfigurationError(
        f"The optimizer{name} would train nothing: OptimizerSpec(trainable={prefix or wanted!r}) matches no parameter "
        f"of {type(module).__name__}.\n{hint}"
    )


def _check_disjoint(optimizers: Sequence[BoundOptimizer], params: View) -> None:
    for slot in params.slots:
        if len(slot.takers) > 1:
            first, second = (optimizers[i].name for i in slot.takers[:2])
            both = [other.name for other in params.slots if set(slot.takers[:2]) <= set(other.takers)]
            more = f" and {len(both) - 3} more" if len(both) > 3 else ""
            if len(slot.aliases) > 1:
                names = " and ".join(graph.path_name(path) for path in slot.aliases[:2])
                raise ConfigurationError(
                    f"The optimizers {first!r} and {second!r} would both train {slot.name}: {names} are one Variable.\n"
                    "Fix: leave it to one of them, with a filter of the other that names what else it trains."
                )
            raise ConfigurationError(
                f"The optimizers {first!r} and {second!r} would both train {', '.join(both[:3])}{more}.\n"
                f"Fix: give each of them its own part, for example OptimizerSpec(tx, "
                f"trainable={str(slot.path[0])!r}) for everything below `{slot.path[0]}`."
            )


def _check_state(part: Part, state: Any) -> None:
    monitor = part.optimizer.monitor
    short = [name for name, leaf in states.injected(state).items() if leaf.dtype in (jnp.bfloat16, jnp.float16)]
    if short:
        raise ConfigurationError(
            f"optax.inject_hyperparams keeps {', '.join(short)} in {states.injected(state)[short[0]].dtype}, the dtype "
            "of the parameters, where 0.999 is 1.0 and Adam divides by zero.\n"
            "Fix: optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
        )
    if monitor is not None and not states.has_plateau(state):
        raise ConfigurationError(
            f"OptimizerSpec(monitor={monitor!r}) has no effect: there is no optax.contrib.reduce_on_plateau in `tx`.\n"
            "Fix: put one at the end, `optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())`."
        )


def _zeros(layout: Layout) -> list[Any]:
    return [jnp.zeros(shape.shape, shape.dtype) for shape in layout.shapes]


def unknown_optimizer(name: Any, known: Mapping[str, Any]) -> ConfigurationError:
    """The error for an optimizer that is not there."""
    names = ", ".join(map(repr, known)) if list(known) != [""] else "one, without a name: leave the name out"
    return ConfigurationError(f"There is no optimizer {name!r}. There are: {names}.")
