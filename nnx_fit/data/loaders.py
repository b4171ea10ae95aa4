"""What the Trainer asks of any loader.

A loader is any re-iterable of batches. The functions below know the kinds that exist (PyTorch, Grain, lists, functions)
and turn their differences into one answer or one clear error. Placing batches on a device is `prefetch`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nnx_fit.errors import ConfigurationError


def iterate(loader: Any) -> Iterator[Any]:
    """Starts one pass over a loader.

    Args:
        loader: An iterable that can be iterated again (a list of batches, an `ArrayLoader`, a PyTorch `DataLoader`, a
            Grain dataset or `DataLoader`), or a function without arguments that returns an iterable.

    Raises:
        ConfigurationError: If it is not a loader, or can be iterated only once.
    """
    kind = type(loader)
    module = kind.__module__.partition(".")[0]
    if isinstance(loader, Mapping | str | bytes | np.ndarray | jax.Array):
        raise ConfigurationError(
            f"A {kind.__name__} is not a loader: iterating over it does not give batches.\n"
            "Fix: wrap arrays in ArrayLoader(arrays, batch_size=...)."
        )
    # A class of the user's own with __next__ may well start again in its __iter__: those are taken as they are.
    if hasattr(kind, "__next__") and module in ("builtins", "itertools", "_io", "nnx_fit", "grain", "torch"):
        raise ConfigurationError(
            f"The loader is a {kind.__name__}, which can be iterated only once, and every epoch needs a new pass.\n"
            "Fix: pass a function that returns it (`make_batches`, not `make_batches()`), or an object with `__iter__` "
            "such as a list, an ArrayLoader, a Grain dataset or a PyTorch DataLoader."
        )
    batches: Any = loader
    if not hasattr(kind, "__iter__") and callable(loader) and not isinstance(loader, type):
        batches = loader()
    if hasattr(type(batches), "__iter__") or batches is not loader:
        _let_grain_read_its_flags(batches)
        return iter(batches)
    raise ConfigurationError(
        f"A {kind.__name__} is not a loader: it cannot be iterated over.\n"
        "Fix: pass an object with `__iter__` that yields batches: an ArrayLoader, a Grain dataset, a list, a PyTorch "
        "DataLoader (around a PyTorch Dataset)."
    )


def _let_grain_read_its_flags(loader: Any) -> None:
    """Grain with worker processes reads absl's flags, which only a program under `absl.app.run` has parsed."""
    if type(loader).__module__.partition(".")[0] == "grain":
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()


def loader_length(loader: Any) -> int | float:
    """Number of batches in one pass, or `inf` where it is unknown or unlimited."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):  # no __len__, or a PyTorch DataLoader over an IterableDataset
        return math.inf
    return length if length < 2**53 else math.inf  # Grain's repeat() without end claims 2**61 items


def start_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader, or its sampler, which epoch its next pass is, where it wants to know.

    Args:
        loader: A loader. Its `set_epoch`, or that of its `sampler` or `batch_sampler`, is called.
        epoch: Index of the epoch, from 0.
    """
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def empty_loader_error(loader: Any, name: str) -> ConfigurationError:
    """The error for a loader that yields nothing.

    Args:
        loader: The loader.
        name: What the user calls it, such as `"train_dataloaders"`.
    """
    fix = "Fix: check the dataset's path and filters."
    if getattr(loader, "drop_last", False):
        fix = "Fix: it has drop_last=True, which drops a batch that is not full: lower batch_size or keep it."
    elif hasattr(type(loader), "__next__"):
        fix = "Fix: it is an iterator and may be used up: pass an object whose `__iter__` starts again each time."
    return ConfigurationError(f"The loader for {name} ({type(loader).__name__}) yielded no batch.\n{fix}")


def check_not_empty(loader: Any, name: str) -> None:
    """Raises `empty_loader_error` for a loader that is known to be empty before it is iterated.

    Args:
        loader: The loader.
        name: What the user calls it, such as `"train_dataloaders"`.
    """
    if loader_length(loader) == 0:
        raise empty_loader_error(loader, name)
