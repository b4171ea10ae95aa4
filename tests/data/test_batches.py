"""`to_arrays`, `batch_size` and `HostOnly`: from a loader's item to what a program takes."""

from __future__ import annotations

import copy
import dataclasses
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnx_fit.data.batches import HostOnly, batch_size, to_arrays
from nnx_fit.errors import ConfigurationError

Pair = namedtuple("Pair", ["x", "y"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sample:
    image: np.ndarray
    label: np.ndarray


X, Y = np.ones((3, 2), np.float32), np.arange(3)


@pytest.mark.parametrize(
    "item",
    [X, jnp.ones(3), (X, Y), [X, Y], {"x": X, "nested": {"y": Y}}, Pair(X, Y), Sample(X, Y), (X, None)],
    ids=["array", "jax", "tuple", "list", "dict", "namedtuple", "dataclass", "none"],
)
def test_arrays_in_any_structure_pass_as_they_are(item):
    batch = to_arrays(item)
    assert batch.full is item
    assert batch.numeric is item


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (3, np.int64),
        (True, np.bool_),
        (2.5, np.float64),
        (1j, np.complex128),
        (np.float32(2.5), np.float32),
        (np.arange(2, dtype=">i4"), np.int32),
    ],
    ids=str,
)
def test_numbers_and_foreign_byte_orders_become_native_arrays(leaf, dtype):
    batch = to_arrays({"x": leaf})
    assert batch.full is batch.numeric
    assert isinstance(batch.full["x"], np.ndarray)
    assert batch.full["x"].dtype == dtype and batch.full["x"].dtype.isnative
    np.testing.assert_array_equal(batch.full["x"], np.asarray(leaf))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
def test_torch_tensors_become_arrays_of_the_same_dtype_and_memory(dtype):
    tensor = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).to(dtype)
    array = to_arrays([tensor]).numeric[0]
    assert isinstance(array, np.ndarray)
    assert str(array.dtype) == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    assert array.ctypes.data == tensor.data_ptr()


def test_torch_tensors_that_need_a_gradient_or_are_lazy_conjugates_are_resolved():
    numeric = to_arrays((torch.ones(2, requires_grad=True), torch.tensor([1j]).conj())).numeric
    np.testing.assert_array_equal(numeric[0], [1, 1])
    np.testing.assert_array_equal(numeric[1], [-1j])


def test_other_leaves_reach_the_host_and_leave_nothing_in_the_program():
    marker = object()
    item = {"image": X, "file": ["a", "b"], "meta": {"tag": marker, "words": np.array(["u", "v", "w"])}}
    batch = to_arrays(item)
    assert batch.full["file"] == ["a", "b"]
    assert batch.full["meta"]["tag"] is marker
    assert jax.tree.leaves(batch.numeric) == [item["image"]]
    assert repr(batch.numeric["meta"]["tag"]) == "HostOnly(batch['meta']['tag'])"
    assert jax.jit(lambda batch: batch["image"].sum())(batch.numeric) == 6


def test_placed_arrays_take_their_places_among_the_other_leaves():
    given = []

    def place(arrays):
        given.extend(arrays)
        return [jnp.asarray(array) for array in arrays]

    batch = to_arrays({"file": "a", "image": X, "label": Y}, place)
    assert [id(array) for array in given] == [id(X), id(Y)]
    assert isinstance(batch.full["image"], jax.Array)
    assert batch.full["image"] is batch.numeric["image"]
    assert batch.full["file"] == "a"
    np.testing.assert_array_equal(batch.full["label"], Y)


def test_strings_of_a_reused_object_array_are_those_of_their_own_batch():
    words = np.array(["a", "b"], dtype=object)
    batch = to_arrays({"x": X, "words": words})
    words[:] = "later"
    assert batch.full["words"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "use",
    [
        lambda leaf: leaf + 1,
        lambda leaf: 2.0 * leaf,
        lambda leaf: leaf[0],
        lambda leaf: len(leaf),
        lambda leaf: bool(leaf),
        lambda leaf: leaf == "cat",
        lambda leaf: leaf.upper(),
        lambda leaf: jnp.asarray(leaf),
        lambda leaf: jnp.sum(leaf),
        lambda leaf: list(leaf),
        lambda leaf: jnp.ones(2) * leaf,
    ],
    ids=["add", "mul", "item", "len", "bool", "equal", "method", "asarray", "jnp", "iterate", "array first"],
)
def test_use_of_a_host_only_leaf_in_a_step_names_it(use):
    batch = to_arrays({"x": X, "text": "cat"})

    def step(batch):
        use(batch["text"])
        return batch["x"]

    message = r"leaf batch\['text'\] is not numeric and is not available inside a step"
    with pytest.raises(ConfigurationError, match=message):
        jax.jit(step)(batch.numeric)


def test_host_only_leaves_do_not_recompile_when_their_values_change():
    traces = []

    @jax.jit
    def step(batch):
        traces.append(1)
        return batch["x"]

    for text in ("cat", "dog"):
        step(to_arrays({"x": X, "text": text}).numeric)
    assert len(traces) == 1


def test_host_only_can_be_printed_and_copied():
    leaf = HostOnly("['text']")
    assert repr(copy.deepcopy(leaf)) == f"{leaf}" == "HostOnly(batch['text'])"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "a", "tag": b"b"}, "yielded a dict whose leaves are bytes, str"),
        ("words", "yielded a str, which JAX takes for a single leaf"),
        (object(), "yielded a object, which"),
        ((), "yielded a tuple without leaves"),
        (np.array(["a"]), "yielded a ndarray"),
    ],
    ids=["dict", "str", "object", "empty", "strings"],
)
def test_a_batch_without_a_number_is_refused_by_its_type(item, message):
    with pytest.raises(ConfigurationError, match=message):
        to_arrays(item)


def test_the_analysis_of_one_batch_is_not_taken_for_another():
    assert to_arrays({"x": X, "y": Y}).full is not None
    mixed = to_arrays({"x": X, "y": np.array(["a"])})
    assert isinstance(mixed.numeric["y"], HostOnly)
    assert isinstance(to_arrays({"x": X, "z": "a"}).numeric["z"], HostOnly)


def test_batch_size_is_the_common_leading_axis():
    assert batch_size({"x": X, "y": Y, "temperature": np.float32(1)}) == 3
    assert batch_size(torch.zeros(4, 2)) == 4
    assert batch_size(to_arrays({"x": X, "text": "a"}).numeric) == 3


def test_batch_size_works_on_tracers():
    sizes = []
    jax.jit(lambda batch: sizes.append(batch_size(batch)))({"x": X})
    assert sizes == [3] and type(sizes[0]) is int


def test_lengths_that_disagree_are_named():
    message = r"(?s)disagree.*batch\['x'\]: length 3, shape \(3, 2\).*batch\['y'\]\[0\]: length 4.*batch_size="
    with pytest.raises(ConfigurationError, match=message):
        batch_size({"x": X, "y": [np.zeros(4)]})


def test_a_batch_of_scalars_has_no_size():
    with pytest.raises(ConfigurationError, match=r"(?s)no leaf has a leading axis.*batch\['x'\]: a scalar"):
        batch_size({"x": np.float32(1)})
