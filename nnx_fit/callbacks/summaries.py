"""Histograms and moments of many arrays at once: binned on the device in one program, unpacked on the host.

Only some hundred bytes of each array travel. How far a running statistic is from what the last batch would have made
of it, and what an update was, come from the same arrays as they were one step before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nnx_fit.loggers.logger import Histogram

BINS = 64
# Places in a row of the program's result, after the bins.
NUM, MIN, MAX, SUM, SUM_SQUARES, MEAN, STD, DRIFT = range(BINS, BINS + 8)
ROW = BINS + 8
_MOMENTS = ("num", "min", "max", "sum", "sum_squares")
UNKNOWN = -1.0  # a drift is never negative


@functools.partial(jax.jit, static_argnames=("decays", "updates"))
def summarize(
    arrays: Sequence[jax.Array],
    previous: Mapping[int, jax.Array],
    *,
    decays: tuple[tuple[int, float], ...] = (),
    updates: tuple[int, ...] = (),
) -> jax.Array:
    """Bins and moments of arrays, and of the updates of some of them.

    Bins and the first five moments are of the finite values; mean and standard deviation are of all.

    Args:
        arrays: Arrays of any numeric dtype; complex ones count by their magnitude.
        previous: By place, some arrays as they were one step before.
        decays: Places of running statistics with what a step keeps of them; `previous` has these.
        updates: Places of parameters whose updates are summarized too; `previous` has these.

    Returns:
        float32, shape `(arrays + updates, ROW)`.
    """
    kept = dict(decays)
    alike: dict[int, list[int]] = {}
    for place, array in enumerate(arrays):
        alike.setdefault(_padded_size(array.size), []).append(place)
    parts: list[jax.Array] = []
    placed: list[int] = []
    # Arrays of about one size are summarized together, so that the program of a deep model is compiled fast.
    for size, places in alike.items():
        now = _stacked([arrays[place] for place in places], size)
        sizes = np.array([[arrays[place].size] for place in places], np.int32)
        drifts = jnp.full(len(places), UNKNOWN)
        own = [i for i, place in enumerate(places) if place in kept]
        if own:
            before = _stacked([previous[places[i]] for i in own], size)
            decay = np.array([kept[places[i]] for i in own], np.float32)
            drifts = drifts.at[np.array(own)].set(drift(before, now[np.array(own)], decay))
        own = [i for i, place in enumerate(places) if place in updates]
        if own:
            moved = now[np.array(own)] - _stacked([previous[places[i]] for i in own], size)
            now = jnp.concatenate([now, moved])
            sizes = np.concatenate([sizes, sizes[own]])
            drifts = jnp.pad(drifts, (0, len(own)), constant_values=UNKNOWN)
        summaries = jnp.concatenate([_rows(now, sizes), drifts[:, None]], 1)
        order = [*places, *(len(arrays) + updates.index(places[i]) for i in own)]
        parts.append(summaries)
        placed.extend(order)
    return jnp.concatenate(parts)[np.argsort(placed)]


def drift(before: jax.Array, after: jax.Array, decay: np.ndarray) -> jax.Array:
    """How far running statistics are from those of the last batch alone, as a share of the larger of the two.

    A layer such as batch normalization (Ioffe and Szegedy, 2015, as `flax.nnx.BatchNorm` has it) moves its running
    statistic from `r` to `r' = m r + (1 - m) b` in a step. So the batch's own statistic was `b = (r' - m r) / (1 - m)`,
    and the drift is `|b - r| / max(|b|, |r|)` with Euclidean norms: 0 where the batch agrees with what was there
    before it, 1 where one of the two is zero, at most 2.

    Args:
        before: `r`, the running statistics before the step, a row for each.
        after: `r'`, the same after it.
        decay: `m` of each row, in 0..1.

    Returns:
        float32, one value for each row; `UNKNOWN` where the step did not move it, since then it saw no batch.
    """
    # The difference first: where r' is close to r, this keeps the digits that (r' - m r) would lose.
    off = (after - before) / (1 - decay[:, None])
    scale = jnp.maximum(jnp.linalg.norm(before + off, axis=1), jnp.linalg.norm(before, axis=1))
    relative = jnp.linalg.norm(off, axis=1) / jnp.where(scale == 0, 1, scale)
    return jnp.where(jnp.any(after != before, axis=1), relative, UNKNOWN)


def scale_of(rows: np.ndarray) -> float:
    """The Euclidean norm of the values that some rows of a summary are of; NaN where one of them is not finite."""
    return float(np.sqrt(np.sum(rows[:, SUM_SQUARES] + 0 * rows[:, MEAN])))


def histograms(tags: Sequence[str], rows: np.ndarray) -> dict[str, Histogram]:
    """The histogram of each row of a summary, by tag; without those that have no finite value."""
    rows = np.asarray(rows, np.float64)
    some = rows[:, NUM] > 0
    low, high = np.where(some, rows[:, MIN], 0), np.where(some, rows[:, MAX], 0)
    # Where all values are one: a bar in the middle, wide enough to tell its edges apart.
    constant = low == high
    bar = np.maximum(1.0, np.abs(low) * 1e-3) / BINS
    first = np.where(constant, low - bar * (BINS // 2 + 0.5), low)
    last = np.where(constant, low + bar * (BINS // 2 - 0.5), high)
    edges = first[:, None] + (last - first)[:, None] * (np.arange(BINS + 1) / BINS)
    edges[:, -1] = last
    counts = np.where(constant[:, None], np.roll(rows[:, :BINS], BINS // 2, axis=1), rows[:, :BINS])
    moments = rows[:, NUM:MEAN].tolist()
    return {
        tag: Histogram(counts[i], edges[i], dict(zip(_MOMENTS, moments[i], strict=True)))
        for i, tag in enumerate(tags)
        if some[i]
    }


def _real(array: jax.Array) -> jax.Array:
    return (jnp.abs(array) if jnp.iscomplexobj(array) else array).astype(jnp.float32)


def _stacked(arrays: Sequence[jax.Array], size: int) -> jax.Array:
    """Arrays as the rows of one, padded with zeros."""
    flat = [_real(array).ravel() for array in arrays]
    return jnp.stack([row if row.size == size else jnp.pad(row, (0, size - row.size)) for row in flat])


def _padded_size(size: int) -> int:
    """The next power of two, at least 64; large arrays are left as they are, since padding costs memory."""
    return max(64, 1 << (size - 1).bit_length()) if size <= 65536 else size


def _rows(x: jax.Array, sizes: np.ndarray) -> jax.Array:
    """The summaries of the rows of `x`, of which the first `sizes` elements count."""
    inside = jnp.arange(x.shape[1]) < sizes
    finite = jnp.isfinite(x) & inside
    low = jnp.min(x, 1, initial=jnp.inf, where=finite, keepdims=True)
    high = jnp.max(x, 1, initial=-jnp.inf, where=finite, keepdims=True)
    width = high - low
    place = jnp.where(finite & (width > 0), (x - low) / jnp.where(width > 0, width, 1) * BINS, 0)
    place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    # Whole numbers: a float32 no longer grows by one beyond 2^24.
    counts = jnp.zeros((x.shape[0], BINS), jnp.int32).at[jnp.arange(x.shape[0])[:, None], place].add(finite)
    values = jnp.where(finite, x, 0)
    # Mean and deviation in one pass, relative to a value of the array itself so that little is cancelled.
    distance = jnp.where(inside, x - x[:, :1], 0)
    offset = distance.sum(1, keepdims=True) / sizes
    variance = (distance**2).sum(1, keepdims=True) / sizes - offset**2
    moments = [
        finite.sum(1, keepdims=True, dtype=jnp.int32).astype(jnp.float32),
        low,
        high,
        values.sum(1, keepdims=True),
        (values**2).sum(1, keepdims=True),
        x[:, :1] + offset,
        jnp.sqrt(jnp.maximum(variance, 0)),
    ]
    return jnp.concatenate([counts.astype(jnp.float32), *moments], 1)
