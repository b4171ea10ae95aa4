"""`Progress`: the one record of where a run is, owned by the fit loop and saved as it is.

`Control` is what is asked of the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Fields that a checkpoint of an earlier version does not have.
_ADDED = ("ended_step",)


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        global_step: Completed updates.
        epoch: Completed epochs; while an epoch runs, its index.
        batch_idx: Batches of the epoch that are done.
        batches: Batches done in all epochs.
        window: Batches done since the last update.
        validated_step: `global_step` of the last validation, -1 before the first.
        in_epoch: Whether an epoch is under way.
        epoch_recorded: Whether its metrics are recorded and its last hook was called, which must not come again when a
            run continues.
        ended_step: `global_step` at which an epoch was ended before its last batch, -1 while none was. A run that
            continues there has nothing of that to do again.
    """

    global_step: int = 0
    epoch: int = 0
    batch_idx: int = 0
    batches: int = 0
    window: int = 0
    validated_step: int = -1
    in_epoch: bool = False
    epoch_recorded: bool = False
    ended_step: int = -1

    def advance(self, updates: bool, skipped: bool = False) -> int:
        """Counts a step that updates, unless it was skipped, or one more batch of its window; returns `global_step`."""
        self.global_step += updates and not skipped
        self.window = 0 if updates else self.window + 1
        return self.global_step

    def state_dict(self) -> dict[str, Any]:
        """The record as a plain dict."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for field in dataclasses.fields(self):
            value = state.get(field.name, field.default) if field.name in _ADDED else state[field.name]
            setattr(self, field.name, type(getattr(self, field.name))(value))


# The reason to stop where `max_time` ends a fit.
TIME_IS_UP = "max_time was reached"


@dataclasses.dataclass
class Control:
    """Requests to a run; the loop acts on them between two steps.

    Attributes:
        accumulate: Batches in a window, from the next batch on.
        should_stop: Whether to stop once `min_epochs` and `min_steps` are reached.
        stop_reason: Why, for the user.
        signal: Number of the signal that asked to end now, or `None`.
        after_batch: Called by the fit loop with the number of batches done, after each: whoever decides between two
            batches that the run ends, sets `signal` then.
    """

    accumulate: int = 1
    should_stop: bool = False
    stop_reason: str | None = None
    signal: int | None = None
    after_batch: Callable[[int], None] = lambda batches: None


class Interrupted(BaseException):
    """Ends the loop after a signal, at a point where everything is consistent.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal
