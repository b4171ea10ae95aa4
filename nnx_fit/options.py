"""`Options`: the Trainer's plain arguments, validated once and never changed."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import re
from typing import Any

from nnx_fit import option_checks as check
from nnx_fit.errors import ConfigurationError
from nnx_fit.option_checks import ClipAlgorithm as ClipAlgorithm
from nnx_fit.option_checks import PrecisionName, invalid

logger = logging.getLogger("nnx_fit")

Limit = int | float


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is asked to do. See `Trainer` for the meaning of each argument.

    `max_time` is in seconds here (`None`: no limit) and `fast_dev_run` a number of batches (0: off).
    """

    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: float | None = None
    limit_train_batches: Limit = 1.0
    limit_val_batches: Limit = 1.0
    limit_test_batches: Limit = 1.0
    limit_predict_batches: Limit = 1.0
    overfit_batches: Limit = 0.0
    fast_dev_run: int = 0
    num_sanity_val_steps: int = 2
    val_check_interval: Limit = 1.0
    check_val_every_n_epoch: int | None = 1
    log_every_n_steps: int = 50
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm = "norm"
    precision: PrecisionName = "32"
    enable_checkpointing: bool = True
    enable_progress_bar: bool = True
    enable_model_summary: bool = True
    detect_nonfinite: bool = False
    deterministic: bool = False
    state_guard: str = "error"
    barebones: bool = False
    jit: bool = True
    reload_dataloaders_every_n_epochs: int = 0

    @property
    def epoch_limit(self) -> int | float:
        """Number of epochs after which training ends; `inf` when only steps or time bound it."""
        return math.inf if self.max_epochs in (None, -1) else self.max_epochs  # type: ignore[return-value]

    @property
    def step_limit(self) -> int | float:
        """Number of updates after which training ends; `inf` when nothing bounds it."""
        return math.inf if self.max_steps == -1 else self.max_steps


# Arguments whose other values later versions take: name, the values that work now.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "steps_per_call": ("auto", 1),
    "strategy": ("auto",),
    "devices": ("auto", 1),
}

_FLAGS = (
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "detect_nonfinite",
    "barebones",
    "jit",
)


def make_options(**arguments: Any) -> Options:
    """Checks the Trainer's arguments against each other.

    Raises:
        ConfigurationError: An argument is invalid; the message names it, its value and the fix.
    """
    arguments = {name: check.plain(value) for name, value in arguments.items()}
    _refuse_not_yet({name: arguments.pop(name) for name in NOT_YET if name in arguments})
    for name in ("max_epochs", "max_steps"):
        check.whole(name, arguments[name], least=-1, optional=name == "max_epochs")
    for name in ("min_epochs", "min_steps"):
        check.whole(name, arguments[name], least=0, optional=True)
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        check.limit(name, arguments[name])
    check.limit("overfit_batches", arguments["overfit_batches"])
    check.whole("num_sanity_val_steps", arguments["num_sanity_val_steps"], least=-1)
    for name in ("log_every_n_steps", "reload_dataloaders_every_n_epochs"):
        check.whole(name, arguments[name], least=0)
    check.whole("check_val_every_n_epoch", arguments["check_val_every_n_epoch"], least=1, optional=True)
    check.whole("accumulate_grad_batches", arguments["accumulate_grad_batches"], least=1)
    clip = check.clipping(arguments["gradient_clip_val"], arguments["gradient_clip_algorithm"])
    arguments["gradient_clip_val"] = clip
    arguments["precision"] = check.precision(arguments["precision"])
    for name in _FLAGS:
        check.flag(name, arguments[name])
    check.interval(arguments["val_check_interval"], arguments["check_val_every_n_epoch"])
    if arguments["state_guard"] not in ("error", "warn", "off"):
        raise invalid("state_guard", arguments["state_guard"], 'expected "error", "warn" or "off"', "pass one of them")
    check.deterministic(arguments["deterministic"])
    arguments["max_time"] = seconds(arguments["max_time"])
    arguments["fast_dev_run"] = check.fast_dev_run(arguments["fast_dev_run"])
    options = Options(**arguments)
    _check_bounds(options)
    return _with_consequences(options)


def seconds(max_time: Any) -> float | None:
    """`max_time` in seconds.

    Args:
        max_time: `"DD:HH:MM:SS"`, a `timedelta`, a dict of its arguments, or `None`.
    """
    if max_time is None:
        return None
    if isinstance(max_time, datetime.timedelta):
        return max_time.total_seconds()
    if isinstance(max_time, dict):
        try:
            return datetime.timedelta(**max_time).total_seconds()
        except TypeError as error:
            raise invalid("max_time", max_time, str(error), 'use keys such as "hours" and "minutes"') from error
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time) if isinstance(max_time, str) else None
    if match is None:
        raise invalid("max_time", max_time, "expected days:hours:minutes:seconds", 'write "00:12:00:00" for 12 hours')
    days, hours, minutes, secs = map(int, match.groups())
    return datetime.timedelta(days=days, hours=hours, minutes=minutes, seconds=secs).total_seconds()


def batches_within(limit: Limit, length: int | float, name: str) -> int | float:
    """How many of a loader's batches a limit leaves: an int is a count, a float a fraction.

    Raises:
        ConfigurationError: A fraction of a loader whose length is unknown, or so small that nothing is left.
    """
    if isinstance(limit, int):
        return min(limit, length)
    if limit in (0.0, 1.0):
        return length if limit else 0
    if math.isinf(length):
        raise invalid(name, limit, "the loader has no length to take a fraction of", "pass a whole number of batches")
    count = int(length * limit)
    if count == 0 < length:
        raise invalid(name, limit, f"that is none of {length} batches", f"use at least {1 / length:.3g}, or a count")
    return count


def _refuse_not_yet(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        works = NOT_YET[name]
        if not any(type(value) is type(known) and value == known for known in works):
            raise ConfigurationError(
                f"Trainer({name}={value!r}): not yet supported. Fix: leave it at {works[0]!r}, the only setting that "
                "works in this version."
            )


def _check_bounds(options: Options) -> None:
    for low, high, limit in (
        ("min_epochs", "max_epochs", options.epoch_limit),
        ("min_steps", "max_steps", options.step_limit),
    ):
        least = getattr(options, low)
        if least is not None and least > limit:
            raise ConfigurationError(
                f"Trainer({low}={least}, {high}={limit}): the minimum is above the maximum. Fix: lower {low}, or raise "
                f"{high}."
            )
    for name in ("fast_dev_run", "detect_nonfinite"):
        if options.barebones and getattr(options, name):
            raise ConfigurationError(
                f"Trainer(barebones=True, {name}={getattr(options, name)}): one asks for nothing but training, the "
                "other for more. Fix: drop one of them."
            )
    if options.fast_dev_run and options.overfit_batches:
        raise ConfigurationError(
            f"Trainer(fast_dev_run={options.fast_dev_run}, overfit_batches={options.overfit_batches}): both choose how "
            "many batches are used. Fix: drop one of them."
        )


def _with_consequences(options: Options) -> Options:
    """The options with what some of them imply for others."""
    changes: dict[str, Any] = {}
    if options.fast_dev_run:
        count = options.fast_dev_run
        changes |= dict.fromkeys(
            ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"), count
        )
        changes |= {"max_epochs": 1, "max_steps": count, "min_epochs": None, "min_steps": None}
        changes |= {"num_sanity_val_steps": 0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    if options.barebones:
        changes |= {
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 0,
        }
    if options.overfit_batches:
        changes |= {"limit_train_batches": options.overfit_batches, "limit_val_batches": options.overfit_batches}
    bounds = (options.max_epochs, options.max_time, options.fast_dev_run or None)
    if options.max_steps == -1 and bounds == (None, None, None):
        logger.warning("Trainer has no bound (max_epochs, max_steps, max_time): it stops after 1000 epochs.")
        changes["max_epochs"] = 1000
    return dataclasses.replace(options, **changes)
