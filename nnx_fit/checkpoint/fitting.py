"""Whether a checkpoint fits a run, found out before anything is loaded; and the way back where it is found out late.

Callbacks, History and loggers are given their state before programs are built, because what they hold decides what is
built. So module and optimizers are compared with the checkpoint before that, by their shapes alone. Only where a hook
of the user's may still change the module, such as `on_load_checkpoint`, this has to wait, and what was loaded by then
is taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

from nnx_fit.callbacks.callback import Callback
from nnx_fit.checkpoint import contents
from nnx_fit.checkpoint.finding import Loaded
from nnx_fit.errors import CheckpointError
from nnx_fit.hooks import ModuleHooks
from nnx_fit.loops.funnel import overrides
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.programs.parts import Parts
from nnx_fit.run import Run
from nnx_fit.state.layout import Layout


def is_settled(run: Run) -> bool:
    """Whether the module that programs will be built from is the module as it is now."""
    if run.verb != "fit":
        return True
    hooks = ("on_load_checkpoint", "on_fit_start")
    changing = [each for each in run.callbacks if each.reads_module and not _only_looks(each)]
    return not any(overrides(run.module, hook, ModuleHooks) for hook in hooks) and not any(
        overrides(each, hook, Callback) for each in changing for hook in hooks
    )


def check_module(loaded: Loaded, run: Run) -> None:
    """Compares a checkpoint with the module.

    Raises:
        CheckpointError: It is of another module; every path that differs is named.
    """
    layout = Layout.of(run.module, run.trains)
    contents.check_module(
        loaded.path, layout, loaded.arrays, contents.kept(run.precision, layout, contents.by_name(loaded.arrays))
    )


def check_optimizers(loaded: Loaded, run: Run, optimizers: Sequence[BoundOptimizer]) -> None:
    """Compares a checkpoint with the states that the optimizers will start with.

    Raises:
        CheckpointError: It is of other optimizers; everything that differs is named.
    """
    layout = Layout.of(run.module, run.trains)
    parts = Parts(optimizers, layout, counted=not run.module.automatic_optimization)
    shapes = contents.kept(run.precision, layout, contents.by_name(loaded.arrays))
    params = {i: shapes[i] for i in layout.positions("params")}

    def states(arrays: dict[int, Any]) -> Any:
        return parts.init([arrays.get(i) for i in range(layout.size)])

    with suppress(TypeError, ValueError):  # one that looks at values cannot be asked for shapes: it is compared later
        expected = jax.eval_shape(states, params)
        contents.check_optimizer(loaded.path, expected, loaded.arrays["optimizer"])


def _only_looks(callback: Callback) -> bool:
    """Whether a callback of this package has a hook at the start of a fit only to read the module."""
    own = type(callback).__module__.split(".")[0] == "nnx_fit"
    return own and not overrides(callback, "on_load_checkpoint", Callback)


class Before:
    """What objects held before a checkpoint was loaded into them."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, Any]] = []

    def remember(self, *owners: Any) -> None:
        """Notes the state of objects with `state_dict` and `load_state_dict`."""
        for owner in owners:
            with suppress(Exception):  # one that has no state yet has none to get back
                self._held.append((owner, copy.deepcopy(owner.state_dict())))

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Gives the objects their state back if the block refuses the checkpoint."""
        try:
            yield
        except CheckpointError:
            for owner, state in self._held:
                owner.load_state_dict(state)
            raise
