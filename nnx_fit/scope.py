"""What a module can ask about what goes on around it: the step being traced, and the run it belongs to.

Both are kept outside the module, so that nothing of a Trainer is ever part of its graph. A step pushes a `StepScope`
while it is traced; a Trainer attaches a `Run` to its module for as long as both live.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from nnx_fit.state.graph import modules

if TYPE_CHECKING:
    from nnx_fit.metrics.capture import Capture
    from nnx_fit.programs.manual import ManualOptimization


@dataclasses.dataclass(frozen=True)
class StepScope:
    """A step being traced (or run eagerly).

    Attributes:
        hook: Name of the step hook, for messages.
        stage: `"train"`, `"validate"`, `"test"` or `"predict"` (`"sanity"` runs the program of `"validate"`).
        module: The traced copy that the step runs on.
        origin: The live module that the traced copy stands for.
        global_step: Updates completed before this step, int32 scalar.
        current_epoch: Index of the epoch, int32 scalar.
        batch_idx: Index of the batch in the epoch, int32 scalar.
        capture: Collects what the step logs.
        optimization: The optimizers of a step that updates by itself, see `programs/manual.py`.
    """

    hook: str
    stage: str
    module: Any
    origin: Any
    global_step: Any
    current_epoch: Any
    batch_idx: Any
    capture: Capture
    optimization: ManualOptimization | None = None


class Run(Protocol):
    """What a run tells its module in host hooks."""

    trainer: Any

    @property
    def global_step(self) -> int:
        """Completed updates."""
        ...

    @property
    def current_epoch(self) -> int:
        """Completed epochs; inside an epoch, its index."""
        ...

    def optimizers(self, name: str | int | None = None) -> Any:
        """The optimizers of the run."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Logs a value in a host hook."""


class _Stack(threading.local):
    def __init__(self) -> None:
        self.scopes: list[StepScope] = []


_STACK = _Stack()
# Weak on both sides: a run holds its module, and the Trainer holds the run.
_RUNS: weakref.WeakKeyDictionary[Any, weakref.ref[Run]] = weakref.WeakKeyDictionary()


def current_step() -> StepScope | None:
    """The step being traced in this thread, or `None`."""
    return _STACK.scopes[-1] if _STACK.scopes else None


@contextmanager
def entered(scope: StepScope) -> Iterator[None]:
    """Makes a step the current one while the block runs."""
    _STACK.scopes.append(scope)
    try:
        yield
    finally:
        _STACK.scopes.pop()


def attach(module: Any, run: Run) -> Run | None:
    """Ties a module, with all below it, to a run; a later run takes the place of an earlier one, which is returned."""
    earlier = _RUNS.get(module)
    _RUNS[module] = weakref.ref(run)
    return earlier() if earlier is not None else None


def run_of(module: Any) -> Run | None:
    """The run a module is tied to: its own, or that of the module it is a part or a traced copy of."""
    scope = current_step()
    if scope is not None:
        module = scope.origin
    elif module not in _RUNS:
        module = next((root for root in list(_RUNS) if any(node is module for _, node in modules(root))), module)
    found = _RUNS.get(module)
    return found() if found is not None else None


def origin_of(module: Any) -> Any:
    """The live module that a traced copy stands for; outside of a step, the module itself."""
    scope = current_step()
    if scope is None:
        return module
    pairs = list(zip(modules(scope.module), modules(scope.origin), strict=False))
    for (_, copy), (_, live) in pairs:
        if copy is module:
            return live
    # A transform inside the step works on copies of its own.
    return next((live for _, (_, live) in pairs if type(live) is type(module)), scope.origin)
