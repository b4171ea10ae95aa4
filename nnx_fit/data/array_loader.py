"""`ArrayLoader`: batches of arrays that fit in memory, with an order and a position that can be reproduced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nnx_fit.errors import ConfigurationError

# A block of copied batches has this many bytes: enough that allocating it costs little per batch, and nothing to mind.
BLOCK_BYTES = 1 << 18


class ArrayLoader:
    """Batches of arrays that fit in memory.

    Every `iter()` starts the next epoch, also when the iteration before it was abandoned midway. The order of epoch
    `e` is a function of `(seed, e)` alone. Batches are views of the arrays when they are not shuffled: do not write
    into them.

    Both the loader and its iterators have `get_state()` and `set_state(state)`, as Grain's iterators do. A state is a
    plain dict of ints and bools and counts rows, so that it stays right when the batch size changes. The iterator's
    stands for the position in its epoch. The loader's is that of the iterator used last; after `loader.set_state`
    the next `iter()` continues there, or starts the next epoch if that one was complete.

    Args:
        arrays: A pytree of arrays with a common leading axis: `{"image": (n, ...), "label": (n,)}`.
        batch_size: Rows in a batch; with several processes, in the batch of all of them together.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a last batch with fewer rows.
        seed: A non-negative int that fixes the order of all epochs.

    Raises:
        ConfigurationError: If the arrays are empty or disagree in length, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from nnx_fit import ArrayLoader
        >>> loader = ArrayLoader({"x": np.arange(5)}, batch_size=2, shuffle=True, seed=1)
        >>> len(loader)
        3
        >>> epoch_0 = [batch["x"].tolist() for batch in loader]
        >>> sorted(sum(epoch_0, []))
        [0, 1, 2, 3, 4]
        >>> loader.set_epoch(0)
        >>> epoch_0 == [batch["x"].tolist() for batch in loader]
        True
    """

    def __init__(
        self, arrays: Any, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, seed: int = 0
    ) -> None:
        self.batch_size = _integer("batch_size", batch_size, 1, "the number of rows in a batch")
        self.seed = _integer("seed", seed, 0, "what fixes the shuffle order")
        self.shuffle = bool(shuffle)
        self.drop_last = drop_last
        self._leaves, self._treedef, self.num_rows = _flatten(arrays)
        self._signature = {"rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle}
        self._next_epoch = 0
        self._pending: tuple[int, int] | None = None  # (epoch, rows) from which the next iter() goes on
        self._current: ArrayIterator | None = None

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(self.num_rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> ArrayIterator:
        epoch, position = self._pending or (self._next_epoch, 0)
        if self._pending is None:
            self._next_epoch = epoch + 1
        self._pending = None
        self._current = ArrayIterator(self, epoch, position)
        return self._current

    def __repr__(self) -> str:
        return f"ArrayLoader({self.num_rows} rows, batch_size={self.batch_size}, shuffle={self.shuffle})"

    def set_epoch(self, epoch: int) -> None:
        """Makes the next `iter()` start an epoch of your choice from its beginning."""
        self._next_epoch = _integer("epoch", epoch, 0, "the index of an epoch")
        self._pending = self._current = None

    def get_state(self) -> dict[str, Any]:
        """Where the iterator used last stands, and which epoch the next new one would have."""
        if self._pending is not None:
            (epoch, position), following = self._pending, self._next_epoch
        elif self._current is not None:
            epoch, position, following = self._current.epoch, self._current.position, self._next_epoch
        else:
            epoch, position, following = self._next_epoch, 0, self._next_epoch + 1
        return {**self._signature, "epoch": epoch, "position": position, "next_epoch": following}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Makes the next `iter()` continue from a state of `get_state`, of this loader or of an iterator of it.

        Raises:
            ConfigurationError: If the state belongs to other data or another order.
        """
        epoch, position = self._check(state)
        self._current = None
        self._next_epoch = int(state.get("next_epoch", epoch + 1))
        self._pending = (epoch, position) if position < self._end() else None

    def _end(self) -> int:
        """Number of rows that an epoch yields."""
        return self.num_rows - self.num_rows % self.batch_size if self.drop_last else self.num_rows

    def _order(self, epoch: int) -> np.ndarray | None:
        """Row numbers of an epoch, shape `(num_rows,)`; `None` when they are simply in order."""
        if not self.shuffle:
            return None
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(self.num_rows)

    def _take(self, order: np.ndarray | None, start: int, stop: int) -> list[np.ndarray]:
        if order is None:
            return [leaf[start:stop] for leaf in self._leaves]
        rows = order[start:stop]
        return [leaf.take(rows, axis=0) for leaf in self._leaves]  # faster than leaf[rows]

    def _check(self, state: Mapping[str, Any]) -> tuple[int, int]:
        for key, mine in self._signature.items():
            if state.get(key) != mine:
                raise ConfigurationError(
                    f"The saved position belongs to another ArrayLoader: {key} was {state.get(key)!r} and is {mine!r}, "
                    "so the rows that are left would not be the same.\n"
                    f"Fix: build the loader with {key}={state.get(key)!r}, or start a new run."
                )
        return int(state["epoch"]), int(state["position"])


class ArrayIterator(Iterator[Any]):
    """One epoch of an `ArrayLoader`.

    Attributes:
        epoch: Index of the epoch.
        position: Number of rows yielded so far.
    """

    def __init__(self, loader: ArrayLoader, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._loader = loader
        self._end = loader._end()
        self._order: np.ndarray | None = None
        self._ordered = False  # the order is made at the first batch: set_state may still choose another epoch
        self._block: list[np.ndarray] = []
        self._block_rows = range(0)

    def __next__(self) -> Any:
        start, stop = self._advance()
        return self._loader._treedef.unflatten(self._loader._take(self._order, start, stop))

    @property
    def structure(self) -> Any:
        """Structure of the batches."""
        return self._loader._treedef

    @property
    def leaves(self) -> list[np.ndarray]:
        """All rows of the arrays, in the structure's order."""
        return self._loader._leaves

    def next_leaves(self) -> list[np.ndarray]:
        """The leaves of the next batch as nobody else has them: read-only, in the dtypes of compiled programs.

        Many batches are copied at once. On a busy machine to allocate a small array costs far more than to fill it.

        Raises:
            StopIteration: The epoch is over.
        """
        start, stop = self._advance()
        rows = self._block_rows
        if start not in rows or stop > rows.stop:  # also where somebody changed the loader's batch_size
            self._read_block(start)
        first = self._block_rows.start
        return [leaf[start - first : stop - first] for leaf in self._block]

    def _advance(self) -> tuple[int, int]:
        """The rows of the next batch, after which the position then is."""
        start, loader = self.position, self._loader
        loader._current = self
        if start >= self._end:
            raise StopIteration
        if not self._ordered:
            self._order, self._ordered = loader._order(self.epoch), True
            self._block_rows = range(0)
        self.position = min(start + loader.batch_size, self._end)
        return start, self.position

    def _read_block(self, start: int) -> None:
        loader = self._loader
        batch_bytes = loader.batch_size * sum(leaf[:1].nbytes for leaf in loader._leaves)
        batches = max(1, BLOCK_BYTES // max(1, batch_bytes))
        self._block_rows = range(start, min(start + batches * loader.batch_size, self._end))
        taken = loader._take(self._order, start, self._block_rows.stop)
        # `take` has copied already; slices are copied here.
        self._block = [leaf.astype(_dtype(leaf), order="C", copy=self._order is None) for leaf in taken]
        for leaf in self._block:
            leaf.flags.writeable = False

    def get_state(self) -> dict[str, Any]:
        """The position after the batch yielded last."""
        return {**self._loader._signature, "epoch": self.epoch, "position": self.position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position; the loader's next `iter()` is then the epoch after it."""
        self.epoch, self.position = self._loader._check(state)
        self._ordered = False
        self._loader._current = self
        self._loader._next_epoch = self.epoch + 1


def _dtype(leaf: np.ndarray) -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))


def _flatten(arrays: Any) -> tuple[list[np.ndarray], Any, int]:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    leaves, lengths = [], {}
    for path, leaf in with_paths:
        name = f"arrays{jax.tree_util.keystr(path)}"
        if not getattr(leaf, "shape", ()):
            raise ConfigurationError(
                f"ArrayLoader: {name} is a {type(leaf).__name__} without a leading axis, so it has no rows.\n"
                "Fix: pass arrays only, `np.asarray(values)` for a list of values."
            )
        leaves.append(np.asarray(leaf))
        lengths[name] = int(leaf.shape[0])
    if not leaves:
        raise ConfigurationError(
            f"ArrayLoader: `arrays` is a {type(arrays).__name__} without arrays.\n"
            'Fix: pass a pytree of arrays, as in ArrayLoader({"x": x, "y": y}, batch_size=32).'
        )
    if len(set(lengths.values())) > 1:
        found = "\n".join(f"    {name}: {length} rows" for name, length in lengths.items())
        raise ConfigurationError(f"ArrayLoader: the arrays disagree in length:\n{found}\nFix: give all the same rows.")
    num_rows = next(iter(lengths.values()))
    if num_rows == 0:
        raise ConfigurationError(f"ArrayLoader: the arrays have no rows ({', '.join(lengths)}).")
    return leaves, treedef, num_rows


def _integer(name: str, value: Any, least: int, meaning: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigurationError(f"{name} must be an int of at least {least} ({meaning}); got {value!r}.")
    return int(value)
