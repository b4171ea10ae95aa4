"""SIGINT and SIGTERM during a run: the first asks the loop to end after its step, a second ends at once.

Where JAX's preemption service is on, SIGTERM belongs to it: all processes agree on the step after which they end, and
another handler here would keep the notice from the others.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import jax

from nnx_fit.loops.progress import Control

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def watched(control: Control) -> Iterator[None]:
    """Notes signals in `control` while the block runs; the handlers there before are called and come back.

    Handlers can be installed in the main thread only; elsewhere nothing but JAX's preemption service is heard.
    """
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

    def install(*numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():
            earlier.update((number, signal.signal(number, handle)) for number in numbers)

    if _preemption_service():
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        def after_batch(batches: int) -> None:
            if control.signal is None and reached_preemption_sync_point(batches):
                control.signal = signal.SIGTERM
                install(signal.SIGTERM)  # the next one ends at once

        control.after_batch = after_batch
        install(signal.SIGINT)
    else:
        install(*SIGNALS)
    try:
        yield
    finally:
        _restore(earlier)


def _preemption_service() -> bool:
    """Whether JAX hears of preemptions itself; it takes SIGTERM for that, in `jax.distributed.initialize`."""
    return jax.distributed.is_initialized() and bool(getattr(jax.config, "jax_enable_preemption_service", True))


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
