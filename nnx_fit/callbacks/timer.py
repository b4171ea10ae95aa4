"""`Timer`: how long the stages of a run take, and an end to training when its time is over.

It decides; the fit loop stops.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nnx_fit.callbacks.callback import Callback, Phase, pausing
from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError
from nnx_fit.options import seconds

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

STAGES = ("train", "validate", "test", "predict")


class Timer(Callback):
    """Measures the wall-clock time of each stage, and stops training after a duration.

    The time of `"train"` is that between `on_train_start` and `on_train_end`, validations and checkpoints included. It
    is saved with checkpoints and goes on where a run continues: a job that is cut off and resumed has its duration
    once, whereas `Trainer(max_time=...)` counts anew. The other stages have the time of their latest loop; sanity
    checks do not count. `min_epochs` and `min_steps` of the Trainer outrank the duration.

    Args:
        duration: Time after which training stops: `"DD:HH:MM:SS"`, a `timedelta`, or a dict of its arguments. `None`
            only measures.
        interval: Look at the clock after each `"step"` or each `"epoch"`.
        verbose: Say so when the time is over.
        clock: Seconds, monotonic.

    Raises:
        ConfigurationError: The duration is none, or the interval is unknown.

    Example:
        >>> from nnx_fit.callbacks.timer import Timer
        >>> timer = Timer("00:00:10:00", interval="epoch")
        >>> timer.time_elapsed(), timer.time_remaining()
        (0.0, 600.0)
    """

    phase: ClassVar[Phase] = "decide"
    reads_module = False
    logs = False

    def __init__(
        self,
        duration: str | datetime.timedelta | Mapping[str, float] | None = None,
        interval: str = "step",
        verbose: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        if interval not in ("step", "epoch"):
            raise ConfigurationError(
                f'Timer(interval={interval!r}): unknown interval. Fix: pass "step" or "epoch", after which the time is '
                "looked at."
            )
        self.duration = _duration(duration)
        self.interval = interval
        self.verbose = verbose
        self._clock = clock
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._before = 0.0  # seconds of training before the run was resumed

    def start_time(self, stage: str = "train") -> float | None:
        """What the clock said when a stage began; `None` before that."""
        return self._start.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """What the clock said when a stage ended; `None` before that."""
        return self._end.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that a stage has taken so far.

        Args:
            stage: `"train"`, `"validate"`, `"test"` or `"predict"`.

        Raises:
            ConfigurationError: There is no such stage.
        """
        before = self._before if stage == "train" else 0.0
        start, end = self.start_time(stage), self.end_time(stage)
        if start is None:
            return before
        return before + (self._clock() if end is None else end) - start

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds until the duration is over, negative afterwards; `None` without one."""
        return None if self.duration is None else self.duration - self.time_elapsed(stage)

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Starts over: another fit has its own time. A run that continues has its state back."""
        if stage == "fit":
            self._start, self._end, self._before = {}, {}, 0.0

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts the time of training, of which a run that continues may have none left."""
        self._begin("train")
        looks = self.duration is not None and self.interval == "step"
        self.paused_until = 0 if looks else sys.maxsize
        self._check(trainer)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the clock, if each step is the interval."""
        if self.interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Looks at the clock."""
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the time of training."""
        self._finish("train")

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts the time of a validation."""
        if not trainer.sanity_checking:
            self._begin("validate")

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the time of a validation."""
        if not trainer.sanity_checking:
            self._finish("validate")

    def on_test_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts the time of a test."""
        self._begin("test")

    def on_test_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the time of a test."""
        self._finish("test")

    def on_predict_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts the time of a prediction."""
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, module: FitModule) -> None:
        """Ends the time of a prediction."""
        self._finish("predict")

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Ends the time of what was cut off."""
        for stage in STAGES:
            self._finish(stage)

    def state_dict(self) -> dict[str, Any]:
        """The seconds that training has taken."""
        return {"time_elapsed": {"train": self.time_elapsed("train")}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._before = float(state["time_elapsed"]["train"])

    def _begin(self, stage: str) -> None:
        self._start[stage] = self._clock()
        self._end.pop(stage, None)

    def _finish(self, stage: str) -> None:
        if stage in self._start:
            self._end.setdefault(stage, self._clock())

    def _check(self, trainer: Trainer) -> None:
        if self.duration is None or trainer.should_stop:
            return
        elapsed = self.time_elapsed("train")
        if elapsed >= self.duration:
            reason = f"{_written(elapsed)} of training reached the duration of {_written(self.duration)}"
            trainer.should_stop = True
            trainer.stop_reason = f"Timer: {reason}"
            if self.verbose:
                say(f"Timer: training stops, {reason}.")


def _written(time_span: float) -> str:
    """A time span as hours:minutes:seconds, in whole seconds."""
    return str(datetime.timedelta(seconds=round(time_span)))


def _known(stage: str) -> str:
    if stage not in STAGES:
        raise ConfigurationError(
            f"Timer has no time of the stage {stage!r}. Fix: ask for one of {', '.join(map(repr, STAGES))}."
        )
    return stage


def _duration(value: Any) -> float | None:
    plain = dict(value) if isinstance(value, Mapping) else value
    try:
        span = seconds(plain)
    except (ConfigurationError, OverflowError):
        span = -1.0
    if span is not None and span < 0:
        raise ConfigurationError(
            f"Timer(duration={value!r}): expected a time span.\n"
            'Fix: write "00:12:00:00" (days:hours:minutes:seconds) for 12 hours, or pass a timedelta or a dict such as '
            '{"hours": 12}.'
        )
    return span
