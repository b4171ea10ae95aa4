"""Where a stage's batches come from: which loaders, how many batches of each, and how a pass over one is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnx_fit.data.datamodule import DataModule, has_loader
from nnx_fit.data.loaders import check_not_empty, iterate, loader_length, start_epoch
from nnx_fit.data.prefetch import Place, Prefetcher, default_place
from nnx_fit.errors import ConfigurationError
from nnx_fit.options import Limit, batches_within

# The argument that takes the loaders of each kind, for messages.
ARGUMENTS = {
    "train": "train_dataloaders",
    "val": "val_dataloaders",
    "test": "dataloaders",
    "predict": "dataloaders",
}


class Repeated:
    """The same few batches in every pass, read once: what `overfit_batches` trains on."""

    def __init__(self, loader: Any, count: int | float):
        self._batches: list[Any] | None = None
        self._loader = loader
        self._count = count

    def __len__(self) -> int:
        return int(self._count)

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            start_epoch(self._loader, 0)
            source = iterate(self._loader)
            # Copied: a loader may fill its buffers again for the next batch.
            self._batches = [
                jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)
                for _, batch in zip(range(len(self)), source, strict=False)
            ]
        return iter(self._batches)


@dataclasses.dataclass
class Source:
    """The loaders of one kind, with how many batches of each are used.

    Attributes:
        kind: `"train"`, `"val"`, `"test"` or `"predict"`.
        loaders: The loaders.
        names: Suffix of each loader's metric names; empty for a single loader.
        limits: Number of batches of a pass over each, `inf` where it is unknown.
        place: Puts a batch on the device.
        every: Epochs in a block, for each of which the loaders are asked for again; 0: they stay.
        block: Index of the block whose loaders these are.
        ask: Makes the source of a block, given the index of its first epoch.
    """

    kind: str
    loaders: list[Any]
    names: list[str]
    limits: list[int | float]
    place: Place = dataclasses.field(default_factory=default_place)
    every: int = 0
    block: int = 0
    ask: Callable[[int], Source] | None = None

    def block_of(self, epoch: int) -> int:
        """Index of the block of epochs that an epoch is in."""
        return epoch // self.every if self.every else 0

    def due(self, epoch: int) -> bool:
        """Whether the loaders are those of another block than the epoch's."""
        return self.block_of(epoch) != self.block

    def renew(self, epoch: int) -> None:
        """Takes the loaders of an epoch's block in the place of those it has."""
        assert self.ask is not None
        self.block = self.block_of(epoch)
        fresh = self.ask(self.block * self.every)
        self.loaders, self.names, self.limits = fresh.loaders, fresh.names, fresh.limits

    def open(self, index: int = 0, epoch: int = 0, limit: int | float | None = None, state: Any = None) -> Prefetcher:
        """Opens one pass over a loader.

        Args:
            index: Which loader.
            epoch: Index of the epoch, for loaders that shuffle by it.
            limit: Number of batches, when fewer than the limit of the kind.
            state: Position to continue from, as `Prefetcher.get_state` gave it.
        """
        loader = self.loaders[index]
        if state is None:
            start_epoch(loader, epoch)
        count = self.limits[index] if limit is None else min(limit, self.limits[index])
        return Prefetcher(loader, self.place, limit=count, state=state)


def find_loaders(kind: str, given: Any, datamodule: Any, module: Any) -> Any:
    """The loaders of a kind: those given, else the data module's, else the module's own; `None` if there are none.

    Raises:
        ConfigurationError: Loaders and a data module were given.
    """
    if given is not None and datamodule is not None:
        raise ConfigurationError(
            f"Both {ARGUMENTS[kind]}= and datamodule= were given; the data would come from two places.\n"
            "Fix: pass one of them."
        )
    if given is not None:
        return given
    owner = datamodule if datamodule is not None else module
    return getattr(owner, f"{kind}_dataloader")() if has_loader(owner, kind) else None


def make_source(kind: str, loaders: Any, limit: Limit, name: str, *, repeated: bool = False) -> Source:
    """Checks the loaders of a kind and counts their batches.

    Args:
        kind: `"train"`, `"val"`, `"test"` or `"predict"`.
        loaders: A loader; for evaluation also a list or dict of them.
        limit: The Trainer's limit for this kind.
        name: Name of that argument, for messages.
        repeated: Use the same batches in every pass.

    Raises:
        ConfigurationError: A loader is none, or is empty.
    """
    if isinstance(loaders, DataModule):
        raise ConfigurationError(f"{ARGUMENTS[kind]} is a DataModule. Fix: pass it as datamodule=.")
    found, names = _several(loaders) if kind != "train" else ([loaders], [""])
    limits = []
    for index, loader in enumerate(found):
        if limit != 0:
            check_not_empty(loader, ARGUMENTS[kind])
        count = batches_within(limit, loader_length(loader), name)
        limits.append(count)
        if repeated:
            found[index] = Repeated(loader, count)
    return Source(kind, found, names, limits)


def _several(loaders: Any) -> tuple[list[Any], list[str]]:
    if isinstance(loaders, Mapping) and loaders and all(_is_loader(item) for item in loaders.values()):
        return list(loaders.values()), [str(key) for key in loaders]
    if isinstance(loaders, list | tuple) and loaders and all(_is_loader(item) for item in loaders):
        if len(loaders) == 1:
            return list(loaders), [""]
        return list(loaders), [f"dataloader_idx_{index}" for index in range(len(loaders))]
    return [loaders], [""]


def _is_loader(item: Any) -> bool:
    """Whether an item of a list is a loader of its own, and not a batch."""
    if isinstance(item, Mapping | tuple | str | bytes | np.ndarray | jax.Array) or hasattr(item, "__array__"):
        return False
    if isinstance(item, list):
        return all(isinstance(batch, Mapping | Sequence) for batch in item)
    return hasattr(type(item), "__iter__") or callable(item)
