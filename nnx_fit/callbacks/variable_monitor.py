"""`VariableMonitor`: histograms, means and standard deviations of running statistics (and parameters) over time.

One small program bins all Variables together on the device; only its result, some hundred numbers for each Variable,
travels, and the run does not wait for it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

BINS = 64
# Places in a row of the program's result, after the bins.
_MOMENTS = ("num", "min", "max", "sum", "sum_squares", "mean", "std")


class VariableMonitor(Callback):
    """Logs each float Variable of the *stats* role: `state/<path>/mean`, `state/<path>/std`, and a histogram.

    Args:
        every_n_steps: Updates between two records. Default: twice the Trainer's `log_every_n_steps`.
        include: NNX filter of the Variables to log. Default: those of the *stats* role.
        params: Log parameters too, trained and frozen ones, as `params/<path>`.
    """

    reads_module = False

    def __init__(self, every_n_steps: int | None = None, include: Any = None, params: bool = False):
        if every_n_steps is not None:
            whole_number("VariableMonitor", "every_n_steps", every_n_steps, least=1)
        self.every_n_steps = every_n_steps
        self.include = include
        self.params = params
        self._interval = 0
        self._tags: dict[str, str] = {}
        self._recorded_step = -1
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Finds the Variables to watch."""
        self._pending.clear()
        self._recorded_step = -1
        self._interval = self.every_n_steps or 2 * trainer.options.log_every_n_steps
        self._tags = self._find(trainer) if trainer.loggers and self._interval else {}

    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records where it is due, and hands on what has arrived."""
        if self._tags and trainer.global_step % self._interval == 0:
            self._record(trainer)
        while self._pending and self._pending[0][1].is_ready():
            self._publish(trainer)

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Records the values that the run ends with."""
        if self._tags and 0 < trainer.global_step != self._recorded_step:
            self._record(trainer)
        while self._pending:
            self._publish(trainer)

    def _find(self, trainer: Trainer) -> dict[str, str]:
        """The paths to watch with their tags."""
        roles = {row.path: row.role for row in trainer.partition.rows}
        included = set(trainer.peek(self.include)) if self.include is not None else None
        tags = {}
        for path, array in trainer.peek(...).items():
            # One of several arrays of a Variable has the path of the Variable and an index.
            role = roles.get(path) or roles.get(path.rpartition("[")[0], "rngs")
            is_param = role in ("params", "frozen")
            wanted = path in included if included is not None else role == "stats"
            if (wanted or (self.params and is_param)) and array.size and jnp.issubdtype(array.dtype, jnp.floating):
                tags[path] = f"{'params' if is_param else 'state'}/{path}"
        return tags

    def _record(self, trainer: Trainer) -> None:
        live = trainer.peek(...)
        summary = _summarize([live[path] for path in self._tags])
        summary.copy_to_host_async()
        self._pending.append((trainer.global_step, summary))
        self._recorded_step = trainer.global_step

    def _publish(self, trainer: Trainer) -> None:
        step, summary = self._pending.popleft()
        rows = dict(zip(self._tags.values(), np.asarray(summary, np.float64), strict=True))
        scalars: dict[str, float] = {}
        for tag, row in rows.items():
            scalars[f"{tag}/mean"], scalars[f"{tag}/std"] = row[BINS + 5], row[BINS + 6]
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
            for tag, counts, edges, moments in _histograms(rows):
                logger.log_histogram(tag, counts, edges, step, moments)


def _histograms(rows: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict[str, float]]]:
    for tag, row in rows.items():
        moments: dict[str, float] = dict(zip(_MOMENTS[:5], row[BINS:].tolist(), strict=False))
        if moments["num"] == 0:
            continue
        low, high, counts = moments["min"], moments["max"], row[:BINS]
        if low == high:
            # All values are one: a bar in the middle, wide enough to tell its edges apart.
            bar = max(1.0, abs(low) * 1e-3) / BINS
            low, high = low - bar * (BINS // 2 + 0.5), low + bar * (BINS // 2 - 0.5)
            counts = np.roll(counts, BINS // 2)
        yield tag, counts, np.linspace(low, high, BINS + 1), moments


@jax.jit
def _summarize(arrays: list[jax.Array]) -> jax.Array:
    """Bins, and moments in the order of `_MOMENTS`, of each array: float32 of shape `(arrays, bins + 7)`.

    Bins and the first five moments are of the finite values; mean and standard deviation are of all.
    """
    alike: dict[int, list[int]] = {}
    for place, array in enumerate(arrays):
        alike.setdefault(_padded_size(array.size), []).append(place)
    rows: dict[int, jax.Array] = {}
    # Arrays of about one size are summarized together, so that the program of a deep model is compiled fast.
    for size, places in alike.items():
        flat = [arrays[place].astype(jnp.float32).ravel() for place in places]
        together = jnp.stack([jnp.pad(array, (0, size - array.size)) for array in flat])
        sizes = jnp.array([[array.size] for array in flat], jnp.int32)
        rows |= zip(places, _rows(together, sizes), strict=True)
    return jnp.stack([rows[place] for place in range(len(arrays))])


def _padded_size(size: int) -> int:
    """The next power of two, at least 1024; large arrays are left as they are, since padding costs memory."""
    return max(1024, 1 << (size - 1).bit_length()) if size <= 65536 else size


def _rows(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """The summaries of the rows of `x`, of which the first `sizes` elements count."""
    inside = jnp.arange(x.shape[1]) < sizes
    finite = jnp.isfinite(x) & inside
    low = jnp.min(x, 1, initial=jnp.inf, where=finite, keepdims=True)
    high = jnp.max(x, 1, initial=-jnp.inf, where=finite, keepdims=True)
    width = high - low
    place = jnp.where(finite & (width > 0), (x - low) / jnp.where(width > 0, width, 1) * BINS, 0)
    place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    counts = jnp.zeros((x.shape[0], BINS)).at[jnp.arange(x.shape[0])[:, None], place].add(finite.astype(jnp.float32))
    values = jnp.where(finite, x, 0)
    # Mean and deviation in one pass, relative to a value of the array itself so that little is cancelled.
    distance = jnp.where(inside, x - x[:, :1], 0)
    offset = distance.sum(1, keepdims=True) / sizes
    variance = (distance**2).sum(1, keepdims=True) / sizes - offset**2
    moments = [
        finite.sum(1, keepdims=True, dtype=jnp.float32),
        low,
        high,
        values.sum(1, keepdims=True),
        (values**2).sum(1, keepdims=True),
        x[:, :1] + offset,
        jnp.sqrt(jnp.maximum(variance, 0)),
    ]
    return jnp.concatenate([counts, *moments], 1)
