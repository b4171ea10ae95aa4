"""Where batches come from: which loaders, how many of each, and how a pass is opened."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from nets import targets

import nnx_fit as nf
from nnx_fit.data.sources import Repeated, Source, find_loaders, make_source
from nnx_fit.errors import ConfigurationError


def array_loader(count=6, batch_size=2, **options):
    return nf.ArrayLoader({"x": np.arange(count)}, batch_size, **options)


def rows(batches):
    return [np.asarray(batch.numeric["x"]).tolist() for batch in batches]


class Data(nf.DataModule):
    def train_dataloader(self):
        return "train"

    def val_dataloader(self):
        return ["val"]


class ModuleWithData(Data):
    def test_dataloader(self):
        return "test"


def test_given_loaders_come_first_then_the_data_module_then_the_module():
    assert find_loaders("train", [1], None, Data()) == [1]
    assert find_loaders("train", None, Data(), ModuleWithData()) == "train"
    assert find_loaders("val", None, None, Data()) == ["val"]
    assert find_loaders("test", None, Data(), ModuleWithData()) is None
    assert find_loaders("test", None, None, ModuleWithData()) == "test"
    assert find_loaders("predict", None, None, object()) is None


@pytest.mark.parametrize(("kind", "argument"), [("train", "train_dataloaders"), ("val", "val_dataloaders")])
def test_loaders_from_two_places_are_refused_by_argument(kind, argument):
    with pytest.raises(ConfigurationError, match=f"{argument}= and datamodule="):
        find_loaders(kind, [1], Data(), None)


def test_a_data_module_in_the_place_of_loaders_is_refused():
    with pytest.raises(ConfigurationError, match=r"val_dataloaders is a DataModule.*datamodule="):
        make_source("val", Data(), 1.0, "limit_val_batches")


ONE = targets(1, 2)
TORCH_STYLE = [[np.ones(2), np.ones(2)], [np.ones(2), np.ones(2)]]


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        (array_loader(), [""]),
        (ONE, [""]),
        (tuple(ONE), [""]),
        (TORCH_STYLE, [""]),
        ([(np.ones(2), np.ones(2))], [""]),
        ([np.ones(2), np.ones(2)], [""]),
        ([jnp.ones(2), jnp.ones(2)], [""]),
        ([ONE], [""]),
        ([array_loader()], [""]),
        ([ONE, ONE], ["dataloader_idx_0", "dataloader_idx_1"]),
        ((array_loader(), array_loader()), ["dataloader_idx_0", "dataloader_idx_1"]),
        ([array_loader(), ONE], ["dataloader_idx_0", "dataloader_idx_1"]),
        ([TORCH_STYLE, TORCH_STYLE], ["dataloader_idx_0", "dataloader_idx_1"]),
        ([lambda: iter(ONE), lambda: iter(ONE)], ["dataloader_idx_0", "dataloader_idx_1"]),
        ({"a": array_loader(), "b": ONE}, ["a", "b"]),
        ({"only": ONE}, ["only"]),
        ({0: array_loader(), 1: array_loader()}, ["0", "1"]),
    ],
)
def test_one_loader_is_told_from_several(loaders, names):
    source = make_source("val", loaders, 1.0, "limit_val_batches")
    assert source.names == names and len(source.loaders) == len(names)
    assert all(list(source.open(index)) for index in range(len(names)))


def test_a_list_given_for_training_is_one_loader_of_batches():
    source = make_source("train", ONE, 1.0, "limit_train_batches")
    assert source.names == [""] and source.loaders == [ONE] and source.limits == [2]


@pytest.mark.parametrize(
    ("limit", "limits"), [(1.0, [3, math.inf]), (2, [2, 2]), (0, [0, 0]), (0.0, [0, 0]), (9, [3, 9])]
)
def test_limits_count_the_batches_of_each_loader(limit, limits):
    source = make_source("val", [array_loader(), lambda: iter(ONE)], limit, "limit_val_batches")
    assert source.limits == limits


def test_a_fraction_is_one_of_each_loaders_own_length():
    source = make_source("val", [array_loader(20), array_loader(8)], 0.5, "limit_val_batches")
    assert source.limits == [5, 2]
    assert [len(rows(source.open(i))) for i in range(2)] == [5, 2]


@pytest.mark.parametrize("empty", [[], {"a": []}], ids=["list", "dict"])
def test_an_empty_loader_is_refused_by_the_name_of_its_argument(empty):
    with pytest.raises(ConfigurationError, match=r"val_dataloaders.*yielded no batch"):
        make_source("val", empty, 1.0, "limit_val_batches")


def test_a_disabled_stage_may_have_empty_loaders():
    assert make_source("val", [], 0, "limit_val_batches").limits == [0]


@pytest.mark.parametrize("thing", [3, {"x": np.ones(3)}, "batches", np.ones((3, 2))])
def test_what_is_no_loader_is_refused_when_a_pass_is_opened(thing):
    with pytest.raises(ConfigurationError, match=r"is not a loader.*\nFix"):
        list(make_source("train", thing, 1.0, "limit_train_batches").open())


def test_each_epoch_of_a_shuffled_loader_has_its_order_whatever_was_read_before():
    source = make_source("train", array_loader(shuffle=True), 1.0, "limit_train_batches")
    third = rows(source.open(epoch=3))
    first = rows(source.open(epoch=0))
    next(source.open())
    assert rows(source.open(epoch=3)) == third != first


def test_a_pass_may_be_cut_short_of_the_limit_but_never_beyond_it():
    source = make_source("val", array_loader(10), 3, "limit_val_batches")
    assert [len(rows(source.open(limit=limit))) for limit in (1, 3, 9, None)] == [1, 3, 3, 3]


def test_a_pass_continues_from_a_position_of_an_earlier_one():
    source = make_source("train", array_loader(shuffle=True), 1.0, "limit_train_batches")
    whole = rows(source.open(epoch=2))
    part = source.open(epoch=2)
    next(part)
    state = part.get_state()
    part.close()
    again = make_source("train", array_loader(shuffle=True), 1.0, "limit_train_batches")
    assert rows(again.open(epoch=2, state=state)) == whole[1:]


@pytest.mark.parametrize("loader", [array_loader(shuffle=True), lambda: iter([{"x": np.arange(2)}] * 3)])
def test_the_position_before_a_batch_that_is_still_to_be_used(loader):
    source = make_source("train", loader, 1.0, "limit_train_batches")
    whole = rows(source.open())
    part = source.open()
    next(part), next(part)
    assert rows(source.open(state=part.get_state(1))) == whole[1:]
    assert rows(source.open(state=part.get_state(2))) == rows(source.open(state=part.get_state())) == whole[2:]
    fresh = source.open()
    next(fresh)
    assert rows(source.open(state=fresh.get_state(0))) == whole


def test_repeated_batches_are_read_once_and_are_those_of_the_first_epoch():
    loader = array_loader(12, shuffle=True)
    expected = rows(Source("train", [array_loader(12, shuffle=True)], [""], [2]).open())
    for _ in range(2):
        repeated = Repeated(loader, 2)
        assert len(repeated) == 2
        source = Source("train", [repeated], [""], [2])
        assert rows(source.open(epoch=0)) == rows(source.open(epoch=1)) == expected
