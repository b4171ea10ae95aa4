"""SIGINT and SIGTERM during a run: the first asks the loop to end after its step, a second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from nnx_fit.loops.progress import Control

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def watched(control: Control) -> Iterator[None]:
    """Notes signals in `control` while the block runs; the handlers there before are called and come back.

    Handlers can be installed in the main thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if control.signal is not None:
            _restore(earlier)
            end_with(number, at_once=True)
        control.signal = number
        previous = earlier[number]
        # Python's own handler for SIGINT raises at once, which is what the loop is spared.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    for number in SIGNALS:
        earlier[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        _restore(earlier)


def end_with(number: int, at_once: bool = False) -> NoReturn:
    """Ends the program the way a signal is expected to: `KeyboardInterrupt`, or exit status 143.

    Args:
        number: The signal.
        at_once: Whether it is the second one, after which nothing is waited for; `ends_at_once` tells it apart.
    """
    ending = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
    ending.at_once = at_once  # type: ignore[union-attr]
    raise ending


def ends_at_once(error: BaseException) -> bool:
    """Whether an exception comes from a second signal."""
    return bool(getattr(error, "at_once", False))


def _restore(earlier: dict[int, Any]) -> None:
    for number, handler in earlier.items():
        if handler is not None:
            signal.signal(number, handler)
