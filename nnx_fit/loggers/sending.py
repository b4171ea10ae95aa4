"""`Sender`: hands calls to a store that takes its time, in order, from a thread, so that the training loop never waits.

What could not be sent because the store is away is kept and tried again; what the store refuses is dropped.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

MOST_WAITING = 100_000  # items that are kept while the store is away; beyond that the oldest are given up


class Sender:
    """Sends in the background.

    Args:
        send_many: Sends a list of items that were given to `put`.
        refused: Whether an exception means that the store will never take this; otherwise it is tried again.
        most: Most items that `send_many` takes at once.
    """

    def __init__(self, send_many: Callable[[list[Any]], None], refused: Callable[[Exception], bool], most: int):
        self._send_many = send_many
        self._refused = refused
        self._most = most
        self._waiting: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._stalled = False
        self._thread: threading.Thread | None = None

    def put(self, items: Sequence[Any]) -> None:
        """Takes items to send, many at once.

        Raises:
            Exception: What an earlier call met; these items are taken all the same.
        """
        self._add(items)

    def call(self, function: Callable[[], Any]) -> None:
        """Takes a function to call, after all that was given before.

        Raises:
            Exception: What an earlier call met; the function is taken all the same.
        """
        self._add([_Call(function)])

    def drain(self, timeout: float) -> None:
        """Waits until everything was sent.

        Args:
            timeout: Seconds after which to give up.

        Raises:
            Exception: What a call met, or a `TimeoutError`.
        """
        with self._changed:
            if self._waiting:
                self._wake()
                done = self._changed.wait_for(lambda: self._stalled or not self._waiting, timeout)
                if not done and self._error is None:
                    raise TimeoutError(f"{len(self._waiting)} records were not taken within {timeout:g} seconds")
            self._raise()

    def _add(self, items: Sequence[Any]) -> None:
        with self._changed:
            self._waiting.extend(items)
            while len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
            self._wake()
            self._raise()

    def _wake(self) -> None:
        self._stalled = False
        if self._thread is None or not self._thread.is_alive():  # a forked process has no threads but its own
            self._thread = threading.Thread(target=self._run, name="nnx_fit-logger", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting and not self._stalled, timeout=5.0):
                    self._thread = None  # idle: a run that is over leaves no thread behind
                    return
                batch = self._next()
            error = self._send(batch)
            with self._changed:
                if error is None or self._refused(error):
                    for item in batch:
                        if self._waiting and self._waiting[0] is item:  # else it was given up meanwhile
                            self._waiting.popleft()
                else:
                    self._stalled = True
                self._error = error or self._error
                self._changed.notify_all()

    def _next(self) -> list[Any]:
        batch: list[Any] = []
        for item in self._waiting:
            if isinstance(item, _Call):
                return batch or [item]
            batch.append(item)
            if len(batch) == self._most:
                break
        return batch

    def _send(self, batch: list[Any]) -> Exception | None:
        try:
            if isinstance(batch[0], _Call):
                batch[0].function()
            else:
                self._send_many(batch)
        except Exception as error:
            return error
        return None


class _Call:
    def __init__(self, function: Callable[[], Any]):
        self.function = function
