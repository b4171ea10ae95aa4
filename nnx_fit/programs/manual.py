"""Manual optimization: what `self.value_and_grad` and `self.optimizers` do inside a `training_step`.

The step's module is updated in place as the step goes on: gradients are those at the values it has at that moment, and
what the function changes beside them (running statistics, RNG streams, logged metrics) is the step's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit import scope
from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import Capture
from nnx_fit.programs import opt_state as states
from nnx_fit.programs.parts import Part, Parts, unknown_optimizer
from nnx_fit.programs.precision import Precision
from nnx_fit.programs.step import loss_of
from nnx_fit.state.closure import in_this_trace, is_of_this_trace, write
from nnx_fit.state.guard import Guard, by_design, report_train, written
from nnx_fit.state.layout import Layout

_FUNCTION = "The function given to self.value_and_grad"


@dataclasses.dataclass(frozen=True)
class TracedOptimizer:
    """An optimizer inside a `training_step` with `automatic_optimization = False`.

    Attributes:
        name: Its name.
    """

    name: str
    _step: ManualOptimization

    def update(self, grads: Any, *, when: Any = True) -> None:
        """Updates the parameters that this optimizer trains, at once.

        Args:
            grads: Their gradients, as `self.value_and_grad(..., optimizer=name)` gives them.
            when: Bool scalar, may be traced: where it is false, nothing changes. `self.global_step % 5 == 0` updates
                in every fifth step.

        Raises:
            ConfigurationError: The gradients are not of these parameters, or this is inside another transform.
        """
        self._step.update(self.name, grads, when)


class ManualOptimization:
    """The optimizers of one step while it is traced.

    Args:
        module: The step's module, merged from the layout.
        layout: Where each leaf is in the flat list of arrays.
        parts: The optimizers.
        opt: The arrays of their states.
        precision: What functions compute in.
        guard: What to do about parameters that a differentiated function writes by hand.

    Attributes:
        grads: The gradients of the last update of each optimizer that was updated.
    """

    def __init__(
        self,
        module: nnx.Module,
        layout: Layout,
        parts: Parts,
        opt: Sequence[Any],
        precision: Precision,
        guard: Guard,
    ):
        self._module = module
        self._layout = layout
        self._parts = parts
        self._states = parts.by_name(opt)
        self._precision = precision
        self._guard: Guard = guard
        self._losses: dict[str, Any] = {}
        self._open = False
        self.grads: dict[str, nnx.State] = {}

    @property
    def opt(self) -> list[Any]:
        """The arrays of the states as they are now."""
        return jax.tree.leaves(self._parts.assembled(self._states))

    @property
    def learning_rates(self) -> Mapping[str, Any]:
        """The learning rate of the last update of each optimizer that was updated, where known."""
        rates = {name: self._parts.each[name].learning_rate(self._states[name], None) for name in self.grads}
        return {name: rate for name, rate in rates.items() if rate is not None}

    @property
    def hyperparams(self) -> Mapping[str, Mapping[str, Any]]:
        """The injected hyperparameters of each optimizer, by name."""
        return {name: states.injected(state) for name, state in self._states.items()}

    def all_grads(self, arrays: Sequence[Any]) -> nnx.State:
        """The gradients of everything that is trained: those of the last updates, zero where there was none.

        Args:
            arrays: The flat list of arrays, for their shapes.
        """
        whole = [jnp.zeros_like(array) for array in arrays]
        for name, grads in self.grads.items():
            whole = self._parts.each[name].view.put(whole, grads)
        return self._layout.state("params", whole)

    def check_used(self, hook: str) -> None:
        """Refuses a step that called no optimizer.

        Raises:
            ConfigurationError: It did not, so that nothing would train.
        """
        if not self.grads:
            raise ConfigurationError(
                f"{hook} updated nothing, although `automatic_optimization = False` leaves the updates to it.\n"
                "Fix: `loss, grads = self.value_and_grad(loss_fn)`, then `self.optimizers().update(grads)`; or remove "
                "`automatic_optimization = False` and return the loss."
            )

    def optimizers(self, name: str | int | None) -> TracedOptimizer | list[TracedOptimizer]:
        """One optimizer by name; without a name the only one, or all of them."""
        if name is None and len(self._parts.each) > 1:
            return [TracedOptimizer(each, self) for each in self._parts.each]
        return TracedOptimizer(self._part(name)[0], self)

    def value_and_grad(
        self, function: Callable[[], Any], name: str | int | None, has_aux: bool
    ) -> tuple[Any, nnx.State]:
        """The value of a function that closes over the module, and its gradient for what an optimizer trains."""
        if self._open:
            raise ConfigurationError("self.value_and_grad inside the function of another one. Fix: call them in turn.")
        self._check_not_nested("self.value_and_grad")
        name, part = self._part(name)
        current = scope.current_step()
        assert current is not None
        exact = self._layout.arrays_of(self._module, step="training_step")
        captures: list[Capture] = []
        layout, precision = self._layout, self._precision

        def again(arrays: list[Any]) -> list[Any]:
            return self._called_again(function, arrays, exact)

        def objective(params: nnx.State) -> tuple[jax.Array, Any]:
            full = part.view.put(exact, params)

            def called(given: list[Any]) -> tuple[Any, list[Any]]:
                captures.append(current.capture.within(given))
                return self._called(function, given, exact, dataclasses.replace(current, capture=captures[-1]))

            given = precision.arrays(layout, full)
            output, after = called(given)
            if own := precision.written_short(layout, full, given, after, again):
                given = precision.arrays(layout, full, own)
                output, after = called(given)
            loss, aux = output if has_aux else (output, None)
            loss, _ = loss_of(loss, params, _FUNCTION)
            if precision.compute is not None:
                loss = loss.astype(jnp.float32)
            self._check_written(part, given, after, again)
            logged = captures[-1].values(), captures[-1].objects
            return loss, (precision.restored(full, given, after), logged, aux)

        own = part.view.state(exact)
        (loss, (after, (values, objects), aux)), grads = jax.value_and_grad(objective, has_aux=True)(own)
        write(self._module, layout, self._updated_from(part, exact, after))
        current.capture.adopt(values, captures[-1].specs(), objects)
        self._losses[name] = loss
        return ((loss, aux) if has_aux else loss), grads

    def update(self, name: str, grads: Any, when: Any) -> None:
        """One update of an optimizer."""
        part = self._parts.each[name]
        if self._open:
            raise ConfigurationError(
                f"self.optimizers({name!r}).update was called inside the function of self.value_and_grad, where the "
                "gradients are not known yet. Fix: call it after."
            )
        self._check_not_nested(f"self.optimizers({name!r}).update")
        arrays = self._layout.arrays_of(self._module, step="training_step")
        params, state = part.view.state(arrays), self._states[name]
        if not part.view.fits(grads) or not _same_shapes(grads, params):
            raise ConfigurationError(
                f"self.optimizers({name!r}).update was given gradients of something else than what that optimizer "
                f"trains.\nFix: take them from `self.value_and_grad(loss_fn, optimizer={name!r})`."
            )
        _, new_params, new_state = part.update(grads, state, params, self._losses.get(name, jnp.float32(jnp.nan)))
        if when is not True:
            new_params, new_state = jax.tree.map(
                lambda new, old: jnp.where(when, new, old), (new_params, new_state), (params, state)
            )
        write(self._module, self._layout, part.view.put(arrays, new_params))
        self._states[name], self.grads[name] = new_state, grads

    def _called(
        self, function: Callable[[], Any], arrays: Sequence[Any], exact: Sequence[Any], step: scope.StepScope
    ) -> tuple[Any, list[Any]]:
        """What the function returns with some arrays in the module, and the arrays it leaves; then it has `exact`."""
        self._open = True
        try:
            with scope.entered(step), in_this_trace(self._module):
                write(self._module, self._layout, arrays)
                output = function()
                return output, self._layout.arrays_of(self._module, step="self.value_and_grad", given=arrays)
        finally:
            self._open = False
            write(self._module, self._layout, exact)

    def _called_again(self, function: Callable[[], Any], arrays: list[Any], exact: Sequence[Any]) -> list[Any]:
        current = scope.current_step()
        assert current is not None
        return self._called(function, arrays, exact, dataclasses.replace(current, capture=current.capture.within()))[1]

    def _check_not_nested(self, what: str) -> None:
        if not is_of_this_trace(self._module):
            raise ConfigurationError(
                f"{what} was called inside a transform within training_step (a nested nnx.jit, scan, vmap or cond).\n"
                "Fix: call it in training_step itself; repeat it with a Python loop, and make it depend on a value "
                "with `update(grads, when=...)`."
            )

    def _check_written(
        self, part: Part, before: list[Any], after: list[Any], again: Callable[[list[Any]], list[Any]]
    ) -> None:
        """Tells of parameters that the function wrote although it is differentiated for them."""
        if self._guard == "off":
            return
        watched = [slot for slot in part.view.slots if not by_design(self._module, slot)]
        if changed := written(watched, before, after, again):
            report_train(changed, self._guard)

    def _updated_from(self, part: Part, before: list[Any], after: list[Any]) -> list[Any]:
        """The arrays to go on with: what is differentiated as it was, but for layers that are made to overwrite it."""
        values = list(after)
        for slot in part.view.slots:
            if not by_design(self._module, slot):
                values[slot.start : slot.stop] = before[slot.start : slot.stop]
        return values

    def _part(self, name: str | int | None) -> tuple[str, Part]:
        each, name = self._parts.each, str(name) if isinstance(name, int) else name
        if name is None and len(each) == 1:
            return next(iter(each.items()))
        if name is None:
            raise ConfigurationError(
                f"There are several optimizers ({', '.join(map(repr, each))}). Fix: say which, "
                f"`optimizer={next(iter(each))!r}`."
            )
        if name not in each:
            raise unknown_optimizer(name, each)
        return name, each[name]


def _same_shapes(grads: Any, params: Any) -> bool:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(grads)] == [leaf.shape for leaf in jax.tree.leaves(params)]
