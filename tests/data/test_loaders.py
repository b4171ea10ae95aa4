"""`ArrayLoader` and what the Trainer asks of any loader."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import grain
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnx_fit.data.loaders import ArrayLoader, check_not_empty, iterate, loader_length, start_epoch
from nnx_fit.errors import ConfigurationError


def rows(batches) -> list[list[int]]:
    return [batch["x"].tolist() for batch in batches]


def flat(batches) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def make(n=10, batch_size=3, **kwargs) -> ArrayLoader:
    return ArrayLoader({"x": np.arange(n), "y": np.arange(n) * 2.0}, batch_size, **kwargs)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), drop_last=st.booleans(), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_epoch_yields_every_row_once_in_batches_of_the_size(n, batch_size, drop_last, shuffle):
    loader = make(n, batch_size, drop_last=drop_last, shuffle=shuffle)
    batches = rows(loader)
    assert len(batches) == len(loader)
    assert all(len(batch) == batch_size for batch in batches[: len(batches) if drop_last else -1])
    seen = sorted(flat(batches))
    assert len(seen) == len(set(seen)) == (n - n % batch_size if drop_last else n)
    if not shuffle:
        assert flat(batches) == list(range(len(seen)))


def test_all_leaves_of_any_pytree_are_sliced_alike():
    loader = ArrayLoader((np.arange(6), {"y": np.arange(12).reshape(6, 2)}), 4, shuffle=True)
    for x, rest in loader:
        np.testing.assert_array_equal(rest["y"][:, 0], x * 2)


def test_batches_in_order_are_views():
    x = np.arange(10)
    batch = next(iter(ArrayLoader({"x": x}, 4)))
    assert np.shares_memory(batch["x"], x)


def test_order_is_a_function_of_seed_and_epoch_alone():
    first, second = make(shuffle=True, seed=3), make(shuffle=True, seed=3)
    epochs = [rows(first) for _ in range(3)]
    assert epochs == [rows(second) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(make(shuffle=True, seed=4)) != epochs[0]
    second.set_epoch(1)
    assert rows(second) == epochs[1]
    assert rows(second) == epochs[2]


def test_an_abandoned_iteration_counts_as_an_epoch():
    whole, abandoned = make(shuffle=True), make(shuffle=True)
    epochs = [rows(whole) for _ in range(2)]
    next(iter(abandoned))
    assert rows(abandoned) == epochs[1]


def test_two_iterators_do_not_disturb_each_other():
    loader = make(shuffle=True)
    expected = [rows(make(shuffle=True)), rows(itertools.islice(iter_epoch(1), 10))]
    first, second = iter(loader), iter(loader)
    mixed = [(next(first)["x"].tolist(), next(second)["x"].tolist()) for _ in range(len(loader))]
    assert [list(part) for part in zip(*mixed, strict=True)] == expected


def iter_epoch(epoch):
    loader = make(shuffle=True)
    loader.set_epoch(epoch)
    return iter(loader)


@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    drop_last=st.booleans(),
    taken=st.integers(0, 40),
    on_loader=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_restored_loader_continues_as_the_uninterrupted_one(n, batch_size, drop_last, taken, on_loader):
    def build():
        return make(n, batch_size, drop_last=drop_last, shuffle=True, seed=7)

    loader = build()
    list(loader)
    iterator = iter(loader)
    taken = len(list(itertools.islice(iterator, taken)))
    state = json.loads(json.dumps(loader.get_state() if on_loader else iterator.get_state()))
    rest = [rows(iterator), *(rows(loader) for _ in range(2))]

    resumed = build()
    if on_loader:
        resumed.set_state(state)
        assert resumed.get_state()["epoch"] == (1 if taken < len(loader) else 2)
        if taken == len(loader):  # that epoch was complete: the next one follows
            rest = rest[1:]
        assert [rows(resumed) for _ in rest] == rest
    else:
        iterator = iter(resumed)
        iterator.set_state(state)
        assert [rows(iterator), *(rows(resumed) for _ in range(2))] == rest


def test_state_of_a_new_loader_is_the_start_and_restores_to_it():
    loader = make(shuffle=True)
    state = loader.get_state()
    epochs = [rows(loader) for _ in range(2)]
    loader.set_state(state)
    assert [rows(loader) for _ in range(2)] == epochs


def test_state_counts_rows_so_that_the_batch_size_may_change():
    loader = make(10, 4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    state, rest = iterator.get_state(), flat(rows(iterator))
    smaller = make(10, 2, shuffle=True)
    smaller.set_state(state)
    assert rows(smaller) == [rest[:2], rest[2:4], rest[4:6]]


@pytest.mark.parametrize(
    ("other", "key"), [({"n": 11}, "rows"), ({"seed": 1}, "seed"), ({"shuffle": False}, "shuffle")], ids=str
)
def test_a_state_of_other_data_or_order_is_refused(other, key):
    state = make(shuffle=True).get_state()
    with pytest.raises(ConfigurationError, match=f"{key} was .* and is .*"):
        make(**{"shuffle": True, **other}).set_state(state)


def test_lengths_that_disagree_are_named_with_their_paths():
    with pytest.raises(ConfigurationError, match=r"(?s)arrays\['x'\]: 3 rows.*arrays\['y'\]: 4 rows"):
        ArrayLoader({"x": np.zeros(3), "y": np.zeros(4)}, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "dict without arrays"),
        ({"x": np.zeros((0, 3))}, r"no rows \(arrays\['x'\]\)"),
        ({"x": np.zeros(3), "y": np.float32(1)}, r"arrays\['y'\] is a float32 without a leading axis"),
        ({"x": ["a", "b"]}, r"arrays\['x'\]\[0\] is a str"),
    ],
    ids=["nothing", "empty", "scalar", "list"],
)
def test_arrays_without_rows_are_refused(arrays, message):
    with pytest.raises(ConfigurationError, match=message):
        ArrayLoader(arrays, 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an int of at least 1 .* got 0"),
        ({"batch_size": 2.5}, "batch_size .* got 2.5"),
        ({"batch_size": True}, "batch_size .* got True"),
        ({"batch_size": 2, "seed": -1}, "seed .* got -1"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        ArrayLoader(np.zeros(3), **kwargs)


def test_torch_tensors_are_taken():
    loader = ArrayLoader({"x": torch.arange(7)}, 3)
    assert rows(loader) == [[0, 1, 2], [3, 4, 5], [6]]


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
        lambda: iter(make()),
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
        (make(3, 4, drop_last=True), "drop_last=True"),
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
    loader = make(shuffle=True)
    start_epoch(loader, 1)
    assert rows(loader) == rows(iter_epoch(1))
    start_epoch([1, 2], 1)
