"""The eval loop: one pass of validation, test or prediction over one or several loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nnx_fit.errors import ConfigurationError
from nnx_fit.loops.funnel import Funnel
from nnx_fit.loops.progress import Control, Interrupted, Progress
from nnx_fit.metrics.ledger import Ledger

# What a stage is called in the names of hooks.
HOOK_STAGE = {"validate": "validation", "test": "test", "predict": "predict"}


class EvalSteps(Protocol):
    """What the loop needs of an eval program."""

    table: Any

    @property
    def accumulators(self) -> Any:
        """The loop's metrics so far."""

    @property
    def rngs(self) -> list[Any]:
        """The RNG streams after the loop."""
        ...

    def begin(self, global_step: int, epoch: int, rngs: list[Any] | None = None) -> None:
        """Starts a loop."""

    def run(self, batch: Any) -> tuple[Any, Any]:
        """Dispatches one step; returns its packed metrics and its outputs."""
        ...

    def finish(self) -> None:
        """Ends the loop."""


class EvalLoop:
    """Runs the batches of an eval stage.

    Args:
        stage: `"validate"`, `"test"` or `"predict"`.
        progress: Where the run is; only read.
        control: Requests to stop.
        funnel: Calls hooks.
        ledger: Takes metrics.
        programs: Gives one program for each loader, once the hooks that begin the loop were called.
        open_batches: Opens a pass over the loader of an index.
        names: Suffix of each loader's metric names (`"dataloader_idx_1"`), empty for a single loader.

    Attributes:
        programs: Those programs.
    """

    def __init__(
        self,
        stage: str,
        progress: Progress,
        control: Control,
        funnel: Funnel,
        ledger: Ledger,
        programs: Callable[[], Sequence[EvalSteps]],
        open_batches: Callable[[int], Any],
        names: Sequence[str],
    ):
        self._hooks = f"on_{HOOK_STAGE[stage]}"
        self._progress = progress
        self._control = control
        self._funnel = funnel
        self._ledger = ledger
        self._find_programs = programs
        self.programs: Sequence[EvalSteps] = []
        self._open_batches = open_batches
        self._names = names

    def run(
        self,
        *,
        record: bool = True,
        keep: Callable[[int, Any], None] | None = None,
        recorded: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Runs the stage.

        Args:
            record: Whether what is logged is recorded; a sanity check's is not.
            keep: Takes each batch's outputs, with the index of its loader.
            recorded: Called once everything is recorded, before the last hook.

        Returns:
            What host hooks logged.
        """
        step = self._progress.global_step
        self._funnel.call(f"{self._hooks}_start")
        self._funnel.call(f"{self._hooks}_epoch_start")
        self.programs = self._find_programs()
        rngs = None
        for index, program in enumerate(self.programs):
            program.begin(step, self._progress.epoch, rngs)
            self._batches(index, program, keep, record)
            rngs = program.rngs
            program.finish()
        self._funnel.call(f"{self._hooks}_epoch_end")
        if record:
            for program, name in zip(self.programs, self._names, strict=True):
                self._ledger.log_epoch(step, program.table, program.accumulators, renamer(name))
            logged = self._ledger.log_host_epoch("eval", step)
        else:
            self._ledger.forget_host("eval")
            logged = {}
        if recorded is not None:
            recorded()
        self._funnel.call(f"{self._hooks}_end")
        return logged

    def _batches(self, index: int, program: EvalSteps, keep: Callable[[int, Any], None] | None, record: bool) -> None:
        funnel, step, rename = self._funnel, self._progress.global_step, renamer(self._names[index])
        start, end = f"{self._hooks}_batch_start", f"{self._hooks}_batch_end"
        starts, ends = funnel.overridden(start), funnel.overridden(end)
        batches = self._open_batches(index)
        try:
            for batch_idx, batch in enumerate(batches):
                if starts:
                    funnel.call(start, batch.full, batch_idx, index)
                packed, outputs = program.run(batch.numeric)
                if record:
                    self._ledger.log_eval_step(step, program.table, packed, rename)
                if keep is not None:
                    keep(index, outputs)
                if ends:
                    funnel.call(end, outputs, batch.full, batch_idx, index)
                if self._control.signal is not None:
                    raise Interrupted(self._control.signal)
            if batches.batches == 0:
                raise ConfigurationError(
                    f"The loader for {self._hooks.removeprefix('on_')} yielded no batch, so nothing was evaluated.\n"
                    "Fix: check that its data is not empty, and that its limit_*_batches is above 0."
                )
        finally:
            batches.close()


def renamer(suffix: str) -> Callable[[str], str]:
    """Adds a loader's suffix to metric names."""
    return lambda name: f"{name}/{suffix}" if suffix else name
