"""What the Trainer asks of any loader."""

from __future__ import annotations

import itertools
import math
from typing import Any

import grain
import numpy as np
import pytest
import torch

from nnx_fit.data.array_loader import ArrayLoader
from nnx_fit.data.loaders import check_not_empty, iterate, loader_length, start_epoch
from nnx_fit.errors import ConfigurationError


def tensor(n: int) -> Any:
    return torch.arange(n)  # PyTorch takes it as a dataset, though its annotations do not say so


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(5))


def make_batches():
    yield from ([1, 2], [3])


ELEMENTS: Any = [{"x": np.int64(i)} for i in range(5)]
RE_ITERABLE = {
    "list": [1, 2],
    "function": make_batches,
    "torch": torch.utils.data.DataLoader(tensor(5), batch_size=2),
    "torch iterable": torch.utils.data.DataLoader(Unsized(), batch_size=2),
    "grain map": grain.MapDataset.source(ELEMENTS).batch(2),
    "grain iter": grain.MapDataset.source(ELEMENTS).to_iter_dataset().batch(2),
    "grain loader": grain.DataLoader(
        data_source=ELEMENTS,
        sampler=grain.samplers.IndexSampler(5, num_epochs=1, shuffle=False, seed=0),
        operations=[grain.transforms.Batch(2)],
    ),
}


@pytest.mark.parametrize("kind", RE_ITERABLE)
def test_every_kind_of_loader_gives_a_whole_pass_each_time(kind):
    passes = [[str(batch) for batch in iterate(RE_ITERABLE[kind])] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(passes[0]) == (2 if kind in ("list", "function") else 3)


class StartsAgain:
    """A hand-written loader that is its own iterator and starts again at `iter()`."""

    def __iter__(self):
        self.left = 3
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return np.zeros(2)


def test_an_iterator_that_starts_again_is_a_loader():
    loader = StartsAgain()
    assert [len(list(iterate(loader))) for _ in range(2)] == [3, 3]


@pytest.mark.parametrize(
    "make_one_shot",
    [
        make_batches,
        lambda: iter([1]),
        lambda: map(abs, [1]),
        lambda: itertools.count(),
        lambda: iter(RE_ITERABLE["torch"]),
        lambda: iter(RE_ITERABLE["grain map"]),
        lambda: iter(RE_ITERABLE["grain loader"]),
        lambda: iter(ArrayLoader(np.arange(4), 2)),
    ],
    ids=["generator", "list", "map", "itertools", "torch", "grain map", "grain loader", "ArrayLoader"],
)
def test_what_can_be_iterated_only_once_is_refused_with_the_fix(make_one_shot):
    one_shot = make_one_shot()
    with pytest.raises(ConfigurationError, match=r"(?s)only once.*pass a function that returns it"):
        iterate(one_shot)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ({"x": np.zeros(3)}, "A dict is not a loader(?s:.*)ArrayLoader"),
        (np.zeros((3, 2)), "A ndarray is not a loader(?s:.*)ArrayLoader"),
        ("train.csv", "A str is not a loader"),
        (3, "A int is not a loader"),
        (torch.utils.data.TensorDataset(torch.zeros(3)), "TensorDataset(?s:.*)PyTorch DataLoader"),
    ],
    ids=["dict", "array", "str", "int", "torch dataset"],
)
def test_what_is_not_a_loader_is_refused_with_the_fix(thing, message):
    with pytest.raises(ConfigurationError, match=message):
        iterate(thing)


def test_length_is_the_number_of_batches_or_infinite_where_unknown():
    known = {"list": 2, "torch": 3, "grain map": 3}
    for kind, loader in RE_ITERABLE.items():
        assert loader_length(loader) == known.get(kind, math.inf), kind
    assert loader_length(RE_ITERABLE["grain map"].repeat()) == math.inf


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], r"val_dataloaders \(list\) yielded no batch"),
        (ArrayLoader(np.arange(3), 4, drop_last=True), "drop_last=True"),
        (torch.utils.data.DataLoader(tensor(3), batch_size=4, drop_last=True), "drop_last=True"),
    ],
    ids=["list", "ArrayLoader", "torch"],
)
def test_an_empty_loader_is_refused_by_name(loader, message):
    with pytest.raises(ConfigurationError, match=message):
        check_not_empty(loader, "val_dataloaders")
    check_not_empty([1], "val_dataloaders")


def test_start_epoch_reaches_the_loader_or_its_sampler():
    dataset = tensor(8)
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    wrapped = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler)
    start_epoch(wrapped, 5)
    assert sampler.epoch == 5
    loader, other = (ArrayLoader(np.arange(9), 9, shuffle=True) for _ in range(2))
    start_epoch(loader, 1)
    (_, second), (started,) = (next(iter(other)), next(iter(other))), loader
    assert started.tolist() == second.tolist()
    start_epoch([1, 2], 1)
