"""`ArrayLoader`: order, positions, and batches that nobody else can write into."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnx_fit.data import array_loader
from nnx_fit.data.array_loader import ArrayLoader
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


def leaves_of(iterator):
    """What `next_leaves` gives until the end."""
    while True:
        try:
            yield iterator.next_leaves()
        except StopIteration:
            return


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 15),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    block=st.sampled_from([1, 100, 400, 1 << 18]),
    start=st.integers(0, 39),
)
@settings(max_examples=60, deadline=None)
def test_blocks_give_the_batches_that_iterating_gives(n, batch_size, drop_last, shuffle, block, start):
    loader = make(n, batch_size, drop_last=drop_last, shuffle=shuffle)
    start = min(start, n)
    state = {**loader.get_state(), "position": start - start % batch_size}
    direct, blocks = iter(loader), iter(loader)
    direct.set_state(state)
    blocks.set_state(state)
    expected = [[leaf.tolist() for leaf in jax.tree.leaves(batch)] for batch in direct]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_loader, "BLOCK_BYTES", block)
        found = [[leaf.tolist() for leaf in leaves] for leaves in leaves_of(blocks)]
    assert found == expected
    assert blocks.get_state() == direct.get_state()


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_a_block_can_be_written_by_nobody(shuffle):
    x = np.arange(10, dtype=np.float32)
    iterator = iter(ArrayLoader({"x": x}, 3, shuffle=shuffle))
    first, second = iterator.next_leaves(), iterator.next_leaves()
    before = first[0].copy(), second[0].copy()
    x[:] = -1
    np.testing.assert_array_equal(first[0], before[0])
    np.testing.assert_array_equal(second[0], before[1])
    with pytest.raises(ValueError, match="read-only"):
        first[0][0] = 1


def test_blocks_have_the_dtypes_of_programs():
    iterator = iter(ArrayLoader({"x": np.arange(3.0), "y": np.arange(3), "z": np.zeros(3, bool)}, 2))
    assert [leaf.dtype for leaf in iterator.next_leaves()] == [np.float32, np.int32, np.bool_]


def test_a_position_set_between_two_batches_of_a_block_is_followed():
    loader = make(9, 2, shuffle=True, seed=4)
    iterator = iter(loader)
    state = iterator.get_state()
    first = [leaf.tolist() for leaf in iterator.next_leaves()]
    iterator.next_leaves()
    iterator.set_state(state)
    assert [leaf.tolist() for leaf in iterator.next_leaves()] == first
    iterator.set_state({**state, "epoch": 1})
    assert [leaf.tolist() for leaf in iterator.next_leaves()] != first


def test_another_batch_size_in_the_middle_of_a_block_loses_no_row(monkeypatch):
    monkeypatch.setattr(array_loader, "BLOCK_BYTES", 64)  # four batches
    loader = make(9, 2)
    iterator = iter(loader)
    found = [iterator.next_leaves()[0].tolist()]
    loader.batch_size = 3
    found += [leaves[0].tolist() for leaves in leaves_of(iterator)]
    assert found == [[0, 1], [2, 3, 4], [5, 6, 7], [8]]
