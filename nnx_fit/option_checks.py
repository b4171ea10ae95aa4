"""Checks of single arguments of the Trainer: each returns the plain value, or says what was expected instead.

What arguments mean together is in `options`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from nnx_fit.errors import ConfigurationError

ClipAlgorithm = Literal["norm", "value"]
PrecisionName = Literal["32", "bf16-mixed", "bf16-true", "16-mixed"]
# Other ways to write them, Lightning's.
_PRECISION_ALIASES = {"32-true": "32", "bf16": "bf16-mixed", "16": "16-mixed"}


def invalid(name: str, value: Any, why: str, fix: str) -> ConfigurationError:
    """The error for an argument's value."""
    return ConfigurationError(f"Trainer({name}={value!r}): {why}. Fix: {fix}.")


def plain(value: Any) -> Any:
    """A NumPy scalar as the Python number that it is; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def whole(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    """Refuses what is no whole number of at least `least`."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        extra = " (-1: no limit)" if least == -1 else ""
        raise invalid(name, value, f"expected a whole number of at least {least}{extra}", "pass such a number")


def flag(name: str, value: Any) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise invalid(name, value, "expected True or False", "pass a bool")


def limit(name: str, value: Any) -> None:
    """Refuses what is neither a number of batches nor a fraction of them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, value, "expected a number of batches (int) or a fraction (float)", "pass one of them")
    if not value >= 0 or (isinstance(value, float) and value > 1):
        raise invalid(
            name, value, "an int is a number of batches from 0, a float a fraction from 0.0 to 1.0", "pass one of them"
        )


def clipping(value: Any, algorithm: Any) -> float | None:
    """The limit of gradients, `None` for none."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
        raise invalid("gradient_clip_val", value, "expected a positive number", "pass one, or None to clip nothing")
    if algorithm not in get_args(ClipAlgorithm):
        raise invalid("gradient_clip_algorithm", algorithm, 'expected "norm" or "value"', "pass one of them")
    return float(value) if value else None


def precision(value: Any) -> str:
    """The name of a precision."""
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    name = _PRECISION_ALIASES.get(name, name)
    if name not in get_args(PrecisionName):
        raise invalid("precision", value, "unknown", f"pass one of {', '.join(map(repr, get_args(PrecisionName)))}")
    return name


def interval(value: Any, every_n_epoch: int | None) -> None:
    """Refuses a `val_check_interval` that is no part of an epoch, or goes ill with `check_val_every_n_epoch`."""
    name = "val_check_interval"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, value, "expected a number of batches (int) or a fraction of an epoch (float)", "pass one")
    if isinstance(value, int) and value < 1:
        raise invalid(name, value, "as an int it is a number of training batches, at least 1", "pass 1 or more")
    if isinstance(value, float) and not 0 < value <= 1:
        raise invalid(name, value, "as a float it is a fraction of an epoch, above 0.0 up to 1.0", "pass one")
    if every_n_epoch is None and isinstance(value, float):
        raise ConfigurationError(
            f"Trainer(check_val_every_n_epoch=None, val_check_interval={value!r}): without epochs the interval "
            "counts training batches across them. Fix: pass val_check_interval as an int."
        )


def fast_dev_run(value: Any) -> int:
    """Number of batches of a trial run, 0 for none."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int) or value < 0:
        raise invalid("fast_dev_run", value, "expected True, False or a number of batches", "pass one of them")
    return value


def deterministic(value: Any) -> None:
    """Refuses what is neither True nor False, Lightning's `"warn"` with a reason of its own."""
    if value == "warn":
        raise invalid("deterministic", value, "XLA has no kernels that only warn", "pass True or False")
    flag("deterministic", value)


def directory(value: Any) -> Path:
    """The directory of a run."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise invalid("default_root_dir", value, "expected the path of a directory", "pass a str or a Path")
    return Path(value)
