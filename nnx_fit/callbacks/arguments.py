"""Checks of callbacks' arguments that several of them have in common."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from nnx_fit.errors import ConfigurationError


def whole_number(owner: str, name: str, value: Any, *, least: int = 0) -> int:
    """Returns a whole number.

    Raises:
        ConfigurationError: It is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{owner}({name}={value!r}): expected a whole number, {least} or more.")
    return value


def seconds(owner: str, name: str, value: Any) -> float | None:
    """Returns a span of time in seconds.

    Args:
        owner: Name of the callback.
        name: Name of the argument.
        value: A `timedelta`, a dict of its arguments, a number of seconds, or `None`.

    Raises:
        ConfigurationError: It is none of these, or not positive.
    """
    if value is None:
        return None
    span: Any = value
    if isinstance(value, Mapping):
        try:
            span = datetime.timedelta(**value)
        except TypeError:
            span = None
    span = span.total_seconds() if isinstance(span, datetime.timedelta) else span
    if isinstance(span, bool) or not isinstance(span, int | float) or span <= 0:
        raise ConfigurationError(
            f"{owner}({name}={value!r}): expected a timedelta, a dict such as {{'minutes': 30}}, or seconds, above 0."
        )
    return float(span)
