"""The one funnel through which every hook is called: in order, with the module up to date, and only if overridden."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from nnx_fit.callbacks.callback import Callback, Phase, keyed
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


# Hooks in which a run is saved with some listeners called and others not; a run that continues calls the others.
RESUMED_HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


class _Listener(NamedTuple):
    """One hook of one owner; `looks` tells whether it may read or write the module, `pauses` has who may skip steps."""

    phase: Phase
    looks: bool
    call: Callable[..., Any]
    pauses: Callback | None
    name: str


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
        self._callbacks = keyed(callbacks)
        self._show = show
        self._timed = timed
        self._listeners: dict[str, list[_Listener]] = {}
        self._called: tuple[str, int] | None = None
        self._resumed: tuple[str, frozenset[str]] | None = None

    def state_dict(self) -> list[Any] | None:
        """Where in a hook the run is: its name, and who has not heard of it yet; `None` outside of those."""
        if self._called is None:
            return None
        hook, count = self._called
        return [hook, [listener.name for listener in self._of(hook)[count:]]]

    def load_state_dict(self, state: Sequence[Any] | None) -> None:
        """Takes back what `state_dict` gave: the next call of that hook is for those who have not heard of it."""
        self._resumed = None if state is None else (str(state[0]), frozenset(state[1]))

    def resumes(self, hook: str) -> bool:
        """Whether the run was saved in the midst of a hook, and the rest of it is still to be called."""
        return self._resumed is not None and self._resumed[0] == hook

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
        tracked = hook in RESUMED_HOOKS and outer is None
        only = self._resumed[1] if self._resumed is not None and self.resumes(hook) else None
        try:
            for index, listener in enumerate(self._of(hook)):
                if listener.phase in phases and (only is None or listener.name in only):
                    if tracked:
                        self._called = (hook, index + 1)
                    if listener.looks:
                        self._show()
                        self.looked = True
                    results.append(listener.call(*args))
        except BaseException:
            if tracked and self._called is not None:  # whoever failed has not done what was to be done
                self._called = (hook, self._called[1] - 1)
            raise
        finally:
            self.hook = outer
        if tracked and "save" in phases:
            self._called = self._resumed = None
        return results

    def call_rest(self, hook: str, *args: Any) -> None:
        """Calls, of those who have not heard of a batch hook in which the run was saved, all that need no outputs."""
        assert self._resumed is not None
        names, self._resumed = self._resumed[1], None
        for listener in self._of(hook):
            if listener.pauses is not None and listener.name in names:
                if listener.looks:
                    self._show()
                listener.call(*args)

    def may_log(self) -> bool:
        """Whether anybody listens to a hook in which `self.log` works and may use it there."""
        if any(overrides(self._module, hook, ModuleHooks) for hook in LOGGING_HOOKS):
            return True
        # A subclass outside of this package may log whatever it likes.
        own = [each for _, each in self._callbacks if each.logs or type(each).__module__.split(".")[0] != "nnx_fit"]
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
            self._listener(name, callback, hook)
            for name, callback in self._callbacks
            if overrides(callback, hook, Callback)
        ]
        order: tuple[Phase, ...] = ("before", "decide", "save")
        listeners.sort(key=lambda listener: order.index(listener.phase))
        if overrides(self._module, hook, ModuleHooks):
            first_after = sum(1 for listener in listeners if listener.phase == "before")
            call = self._timed(f"{type(self._module).__name__}.{hook}", getattr(self._module, hook))
            listeners.insert(first_after, _Listener("before", True, call, None, "module"))
        return listeners

    def _listener(self, name: str, callback: Callback, hook: str) -> _Listener:
        function = getattr(callback, hook)
        call = self._timed(
            f"{type(callback).__name__}.{hook}", functools.partial(function, self._trainer, self._module)
        )
        pauses = callback if getattr(function, "pausing", False) else None
        return _Listener(callback.phase, callback.reads_module, call, pauses, name)


def overrides(owner: Any, hook: str, base: type) -> bool:
    """Whether an object has a hook of its own, on its class or on the instance."""
    if not hasattr(owner, hook):
        return False
    return hook in vars(owner) or getattr(type(owner), hook, None) is not getattr(base, hook, None)
