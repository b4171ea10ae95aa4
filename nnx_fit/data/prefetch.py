"""`Prefetcher`: one pass over a loader, with batches placed on the device ahead of their use.

There is no background thread: JAX copies and computes asynchronously, so that the main thread reads and places the next
batches while the device works on this one (Grain and PyTorch bring workers of their own). It also keeps the position
that a run must be resumed from, which is that of the batches handed out and not of those read ahead.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from nnx_fit.data.array_loader import ArrayIterator, ArrayLoader
from nnx_fit.data.batches import Batch, Place, is_plain, to_arrays
from nnx_fit.data.loaders import iterate
from nnx_fit.data.positions import decoded, encoded, here
from nnx_fit.errors import ConfigurationError

_log = logging.getLogger("nnx_fit")
_PLAIN = frozenset((int, bool, str, float, type(None)))


def default_place(device: Any = None) -> Place:
    """What puts the arrays of a batch where the programs of one device take them.

    On CPU nothing is done: a program takes a NumPy array for about 1 us, and `device_put` of two small arrays costs
    60 us.

    Args:
        device: The `jax.Device`; default: JAX's default device.
    """
    if device is None:
        default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        device = jax.local_devices(backend=default)[0] if isinstance(default, str | None) else default
    if device.platform == "cpu":
        return lambda arrays: arrays
    return lambda arrays: jax.device_put(arrays, device)


def safe_copies(arrays: list[Any]) -> list[Any]:
    """Read-only copies of NumPy arrays, in the dtypes of compiled programs; other arrays are left as they are.

    A loader may fill its buffers again while the device still reads them: `jax.device_put` with `may_alias=False` and
    even `jnp.array` do not protect from that on CPU.
    """
    copies = []
    for array in arrays:
        if type(array) is np.ndarray:
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), order="C")
            array.flags.writeable = False
        copies.append(array)
    return copies


class Prefetcher(Iterator[Batch]):
    """One pass over a loader: an iterator of `Batch` whose arrays are on the device.

    An exception in the loader (or in placing) is raised where its batch would have come, after the batches before it.

    Args:
        loader: What `iterate` takes.
        place: From the arrays of a batch to the same on the device or devices; nobody writes into what it is given.
        depth: How many batches are read and placed at a time, the one handed out included; 1 reads nothing ahead.
        limit: Number of batches after which the pass ends; none beyond it is asked of the loader.
        state: A state from `get_state` to continue from. With `depth` and `limit` as they were, what comes is what
            would have come. A pass that had ended yields nothing and leaves the loader ready for the next one.

    Attributes:
        batches: Number of batches handed out, those before a resume included.
        wait_seconds: Time spent waiting for the loader.
        resumed: How `state` was restored: `"exact"` by the loader itself, or `"replayed"` by reading and dropping the
            batches before it, because the loader has no `get_state` and `set_state`; `None` without a state.

    Raises:
        ConfigurationError: If the loader is none, or does not take the state.

    Example:
        >>> import numpy as np
        >>> batches = Prefetcher([{"x": np.zeros(3)}, {"x": np.ones(2)}], default_place())
        >>> [batch.numeric["x"].shape for batch in batches], batches.batches
        ([(3,), (2,)], 2)
    """

    def __init__(
        self,
        loader: Any,
        place: Place,
        depth: int = 2,
        *,
        limit: int | float | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.batches = 0
        self.wait_seconds = 0.0
        self.resumed: Literal["exact", "replayed"] | None = None
        self._loader = loader
        self._place = place
        self._depth = max(1, depth)
        self._limit = math.inf if limit is None else limit
        self._queue: deque[tuple[Batch | Exception, Any]] = deque()
        self._iterator: Iterator[Any] | None = None
        self._source: Any = None  # what has get_state(): the loader, its iterator, or nothing
        self._position: Callable[[], Any] = _nowhere
        self._read: Callable[[], Any]
        self._convert: Callable[[Any], Batch]
        self._ended: Literal["loader", "limit", "error", "closed"] | None = None
        self._state: Any = None
        self._last_state: Any = None
        self._state_before: Any = None  # the position before the batch handed out last
        if state is None:
            if self._limit > 0:
                self._open()
        else:
            self._resume(state)
        self._pulled = self.batches
        if self._pulled >= self._limit:
            self._ended = self._ended or "limit"

    @property
    def exhausted(self) -> bool:
        """Whether the batch handed out last was the final one; with `depth=1` known only when the loader was asked."""
        return self.batches == self._pulled and self._ended in ("loader", "limit")

    def __next__(self) -> Batch:
        queue = self._queue
        while self._ended is None and len(queue) < self._depth:
            self._pull()
        if not queue:
            self.close()
            raise StopIteration
        batch, state = queue.popleft()
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self.batches += 1
        self._state_before, self._state = self._state, state
        return batch

    def close(self) -> None:
        """Ends the pass: drops what was read ahead and closes the loader's iterator. May be called again."""
        self._queue.clear()
        self._ended = self._ended or "closed"
        iterator, self._iterator, self._source = self._iterator, None, None
        close = getattr(iterator, "close", None)
        if callable(close) and iterator is not self._loader:
            close()

    def get_state(self, batches: int | None = None) -> dict[str, Any]:
        """The position after the batch handed out last: a plain dict for JSON, to be given to a new `Prefetcher`.

        Args:
            batches: Number of batches that are done with: `self.batches`, or one fewer if the last one is still to be
                used. Default: all that were handed out.
        """
        if batches is not None and batches < self.batches:
            state, kind = self._state_before, "replay" if self._state_before is None else "exact"
            return {"kind": kind, "batches": batches, "ended": None, "state": encoded(state, self._loader)}
        ended = self._ended if self.exhausted else None
        state = self._last_state if ended == "loader" and self._last_state is not None else self._state
        return {
            "kind": "replay" if state is None else "exact",
            "batches": self.batches,
            "ended": ended,
            "state": encoded(state, self._loader),
        }

    def _open(self) -> None:
        self._iterator = iterate(self._loader)
        self._source = next((part for part in (self._loader, self._iterator) if _has_position(part)), None)
        self._position = _position_of(self._source)
        self._read, self._convert = self._stages(self._iterator)
        self._state = self._position()

    def _stages(self, iterator: Any) -> tuple[Callable[[], Any], Callable[[Any], Batch]]:
        """What reads an item, and what makes a batch of it."""
        place = self._place
        if type(iterator) is ArrayIterator and is_plain(iterator.structure, iterator.leaves):
            unflatten = iterator.structure.unflatten

            def whole(leaves: list[Any]) -> Batch:
                arrays = unflatten(place(leaves))
                return Batch(arrays, arrays)

            return iterator.next_leaves, whole
        return iterator.__next__, lambda item: to_arrays(item, lambda arrays: place(safe_copies(arrays)))

    def _pull(self) -> None:
        start = time.perf_counter()
        try:
            item = self._read()
        except StopIteration:
            self._ended = "loader"
            if self._source is self._loader:
                self._last_state = self._position()
            return
        except Exception as error:
            self._fail(error)
            return
        finally:
            self.wait_seconds += time.perf_counter() - start
        try:
            state = self._position()
            self._queue.append((self._convert(item), state))
        except Exception as error:
            self._fail(error)
            return
        self._pulled += 1
        if self._pulled >= self._limit:
            self._ended = "limit"

    def _fail(self, error: Exception) -> None:
        self._queue.append((error, None))
        self._ended = "error"

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.batches, self._ended = int(state["batches"]), state["ended"]
        saved = decoded(state["state"])
        if _has_position(self._loader) and state["kind"] == "exact":
            self._restore(self._loader, saved)
            if self._ended == "loader":
                self._last_state = self._state = saved  # iterating would take the next pass away
            else:
                self._open()
            return
        if self._ended is not None:
            if state["kind"] == "replay":
                self._say_what_is_read_again(0)
            self._state, self.resumed = saved, "exact"
            return
        self._open()
        if _has_position(self._iterator) and state["kind"] == "exact":
            self._restore(self._iterator, saved)
            self._state = saved
        else:
            self._say_what_is_read_again(self.batches)
            self._replay()

    def _restore(self, part: Any, saved: Any) -> None:
        try:
            part.set_state(here(saved, part))
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"The loader ({type(self._loader).__name__}) did not take the position that it had saved: {error}\n"
                "Fix: build the loader as it was built in the run that is resumed."
            ) from error
        self.resumed = "exact"

    def _say_what_is_read_again(self, count: int) -> None:
        again = f"the first {count} batches of the epoch are read again" if count else "the next epoch is a new pass"
        _log.info(
            "The loader (%s) has no saved position: %s. Nothing is lost or trained on twice if its epochs have the "
            "batches that they had before; one that shuffles needs a seed and set_epoch for that, or get_state and "
            "set_state.",
            type(self._loader).__name__,
            again,
        )

    def _replay(self) -> None:
        iterator: Any = self._iterator
        for count in range(self.batches):
            try:
                next(iterator)
            except StopIteration:
                raise ConfigurationError(
                    f"The loader ({type(self._loader).__name__}) cannot be brought back to batch {self.batches} of its "
                    f"pass: it ended after {count}.\n"
                    "Fix: resume with the data that the run was started with."
                ) from None
        self._state = self._position()
        self.resumed = "replayed"


def _has_position(part: Any) -> bool:
    return callable(getattr(part, "get_state", None)) and callable(getattr(part, "set_state", None))


def _position_of(source: Any) -> Callable[[], Any]:
    """What tells the position of a loader, which may hand out the very dict that it goes on changing."""
    if source is None:
        return _nowhere
    if type(source) is ArrayLoader:  # a new dict each time
        return source.get_state

    def position() -> Any:
        state = source.get_state()
        if type(state) is dict and _PLAIN.issuperset(map(type, state.values())):
            return state.copy()
        return copy.deepcopy(state)

    return position


def _nowhere() -> None:
    """The position of a loader that knows none."""
