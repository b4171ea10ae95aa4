"""The one funnel through which every hook is called: in order, with the module up to date, and only if overridden."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from nnx_fit.callbacks.callback import Callback, Phase
from nnx_fit.errors import ConfigurationError
from nnx_fit.hooks import ModuleHooks

# Default (on_step, on_epoch) of `self.log` in the host hooks that may log.
LOGGING_HOOKS: dict[str, tuple[bool, bool]] = {
    "on_train_start": (False, True),
    "on_train_epoch_start": (False, True),
    "on_train_batch_start": (True, False),
    "on_train_batch_end": (True, False),
    "on_train_epoch_end": (False, True),
} | {
    f"on_{stage}_{point}": (False, True)
    for stage in ("validation", "test")
    for point in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")
}


class _Listener(NamedTuple):
    """One hook of one owner; `looks` tells whether it may read or write the module, `pauses` has who may skip steps."""

    phase: Phase
    looks: bool
    call: Callable[..., Any]
    pauses: Callback | None


class Funnel:
    """Calls hooks: callbacks in list order, the module, then callbacks that decide, then those that save.

    Args:
        trainer: First argument of a callback's hooks.
        module: The module, second argument of a callback's hooks.
        callbacks: Callbacks in list order.
        show: Brings the module's Variables up to date; called before a hook that may look at them.
        timed: Gives a function like the one it is given, whose calls are measured under a name.

    Attributes:
        hook: Name of the hook being called, or `None`.
        looked: Whether a hook that may change the module was called since this was last set to False.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: Sequence[Callback],
        show: Callable[[], None],
        timed: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, function: function,
    ):
        self.hook: str | None = None
        self.looked = False
        self._trainer = trainer
        self._module = module
        self._callbacks = list(callbacks)
        self._show = show
        self._timed = timed
        self._listeners: dict[str, list[_Listener]] = {}

    def silence(self, *hooks: str) -> None:
        """Lets nobody hear of some hooks."""
        self._listeners.update({hook: [] for hook in hooks})

    def overridden(self, hook: str) -> bool:
        """Whether anybody listens to a hook."""
        return bool(self._of(hook))

    def takes_outputs(self, hook: str) -> bool:
        """Whether anybody who listens to a batch hook may use the step's outputs."""
        return any(listener.pauses is None for listener in self._of(hook))

    def paused_until(self, hook: str) -> int:
        """The first `global_step` at which somebody wants to hear of a batch."""
        listeners = self._of(hook)
        return min([0 if each.pauses is None else each.pauses.paused_until for each in listeners], default=sys.maxsize)

    def call(self, hook: str, *args: Any, phases: Iterable[Phase] = ("before", "decide", "save")) -> list[Any]:
        """Calls a hook.

        Args:
            hook: Its name.
            *args: What a module's hook takes; a callback's takes the trainer and the module first.
            phases: Which listeners to call. The module's own hook belongs to `"before"`.

        Returns:
            What each listener returned.
        """
        results = []
        outer, self.hook = self.hook, hook
        try:
            for listener in self._of(hook):
                if listener.phase in phases:
                    if listener.looks:
                        self._show()
                        self.looked = True
                    results.append(listener.call(*args))
        finally:
            self.hook = outer
        return results

    def may_log(self) -> bool:
        """Whether anybody listens to a hook in which `self.log` works and may use it there."""
        if any(overrides(self._module, hook, ModuleHooks) for hook in LOGGING_HOOKS):
            return True
        # A subclass outside of this package may log whatever it likes.
        own = [each for each in self._callbacks if each.logs or type(each).__module__.split(".")[0] != "nnx_fit"]
        return any(overrides(callback, hook, Callback) for callback in own for hook in LOGGING_HOOKS)

    def log_defaults(self, name: str, on_step: bool | None = None) -> tuple[bool, bool]:
        """How `self.log` in the current hook records by default.

        Args:
            name: Name of the metric, for messages.
            on_step: What `self.log` was given.

        Raises:
            ConfigurationError: Nothing can be logged in the current hook, or nothing that belongs to a step.
        """
        if self.hook in LOGGING_HOOKS:
            if on_step and "_batch_" not in self.hook:
                raise ConfigurationError(
                    f"self.log({name!r}, ..., on_step=True) was called in {self.hook}, which belongs to no step.\n"
                    "Fix: leave on_step out, or call it in a step or a batch hook."
                )
            return LOGGING_HOOKS[self.hook]
        where = f"in {self.hook}" if self.hook else "outside of a hook"
        raise ConfigurationError(
            f"self.log({name!r}, ...) was called {where}, where no step or epoch is under way.\n"
            "Fix: call it in a step, or in a batch or epoch hook."
        )

    def _of(self, hook: str) -> list[_Listener]:
        found = self._listeners.get(hook)
        if found is None:
            found = self._listeners[hook] = self._find(hook)
        return found

    def _find(self, hook: str) -> list[_Listener]:
        listeners = [
            self._listener(callback, hook) for callback in self._callbacks if overrides(callback, hook, Callback)
        ]
        order: tuple[Phase, ...] = ("before", "decide", "save")
        listeners.sort(key=lambda listener: order.index(listener.phase))
        if overrides(self._module, hook, ModuleHooks):
            first_after = sum(1 for listener in listeners if listener.phase == "before")
            call = self._timed(f"{type(self._module).__name__}.{hook}", getattr(self._module, hook))
            listeners.insert(first_after, _Listener("before", True, call, None))
        return listeners

    def _listener(self, callback: Callback, hook: str) -> _Listener:
        function = getattr(callback, hook)
        call = self._timed(
            f"{type(callback).__name__}.{hook}", functools.partial(function, self._trainer, self._module)
        )
        pauses = callback if getattr(function, "pausing", False) else None
        return _Listener(callback.phase, callback.reads_module, call, pauses)


def overrides(owner: Any, hook: str, base: type) -> bool:
    """Whether an object has a hook of its own, on its class or on the instance."""
    if not hasattr(owner, hook):
        return False
    return hook in vars(owner) or getattr(type(owner), hook, None) is not getattr(base, hook, None)
