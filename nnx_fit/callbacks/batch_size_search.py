"""How the largest batch size that fits is looked for, given something that tells whether one fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from nnx_fit.errors import ConfigurationError

SearchMode = Literal["power", "binsearch"]
SEARCH_MODES = get_args(SearchMode)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        size: The largest size that was tried and fits.
        too_large: The smallest size that was tried and does not fit; `None` if all did.
    """

    size: int
    too_large: int | None


def largest_that_fits(
    fits: Callable[[int], bool],
    start: int,
    *,
    mode: SearchMode = "power",
    max_trials: int = 25,
    limit: Callable[[], int | float] = lambda: math.inf,
) -> Found:
    """Looks for the largest size that fits: doubles it, then, with `"binsearch"`, halves the interval that is left.

    A start that does not fit is halved until something does.

    Args:
        fits: Tells whether a size fits; one that is larger than another which does not fit is never asked for.
        start: The first size that is tried.
        mode: `"power"` ends with the first size that does not fit, `"binsearch"` when the answer is exact.
        max_trials: Largest number of sizes to try.
        limit: Largest size that makes sense; asked for again after each size that fits.

    Raises:
        ConfigurationError: Nothing that was tried fits.
    """
    low, high = 0, None
    size = int(min(start, limit()))
    for _ in range(max_trials):
        if fits(size):
            low = size
        else:
            high = size
        following = _following(low, high, mode, limit())
        if following is None:
            break
        size = following
    if low == 0:
        raise ConfigurationError(
            f"No batch size fits into memory: the smallest that was tried is {high}.\n"
            + ("Fix: make the model or the examples smaller." if high == 1 else "Fix: start lower, or try more often.")
        )
    return Found(low, high)


def _following(low: int, high: int | None, mode: SearchMode, limit: int | float) -> int | None:
    """The size to try next, when `low` fits and `high` does not; `None` at the end."""
    if high is None:
        following = int(min(2 * low, limit))
        return following if following > low else None
    if high - low <= 1 or (mode == "power" and low > 0):
        return None
    return (low + high) // 2
