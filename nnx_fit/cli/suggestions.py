"""The nearest valid name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_") if part)


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that `name` was probably meant to be.

    Args:
        name: What was typed.
        candidates: Names that exist.
        cutoff: Least similarity in 0..1 (`difflib`'s ratio).

    Returns:
        The nearest candidate; one whose initials are `name` (`lr` for `learning_rate`) where no other is near;
        `None` without one.
    """
    names = sorted(set(candidates))
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    if close:
        return lowered[close[0]]
    if len(name) > 1:
        return next((candidate for candidate in names if _initials(candidate) == name.lower()), None)
    return None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence with the nearest candidate, led by a space, or nothing."""
    match = nearest(name, candidates)
    return f" Did you mean {match}?" if match else ""


def listing(names: Iterable[str]) -> str:
    """Names in one line, sorted."""
    return ", ".join(sorted(set(names)))
