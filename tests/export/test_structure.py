"""A pytree's structure in plain values, and the pytree put together from it without its classes."""

from __future__ import annotations

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import nnx_fit as nf
from nnx_fit.export import structure

Point = collections.namedtuple("Point", ["x", "y"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    first: object
    second: object


@struct.dataclass
class FlaxData:
    first: object
    second: object


def there_and_back(tree):
    description, leaves = structure.describe(tree, "the tree")
    return structure.rebuilt(json.loads(json.dumps(description)), iter(leaves))


@pytest.mark.parametrize(
    "tree",
    [
        1,
        None,
        [],
        {},
        {"a": 1, "b": [2, (3, None), ()], "c": {"d": {}}},
        {2: 1, 1: 2},
        (1, [2]),
        [None, {"x": (None,)}],
    ],
)
def test_standard_containers_come_back_as_they_are(tree):
    found = there_and_back(tree)
    assert found == tree
    assert jax.tree.structure(found) == jax.tree.structure(tree)


def test_a_named_tuple_comes_back_as_one_of_its_name_and_fields():
    found = there_and_back({"p": Point(1, Point(2, None))})["p"]
    assert (found.x, found.y.x, found.y.y) == (1, 2, None)
    assert found == Point(1, Point(2, None))
    assert type(found).__name__ == "Point" and type(found) is type(found.y) is type(there_and_back(Point(0, 0)))


@pytest.mark.parametrize("kind", [Registered, FlaxData])
def test_a_class_with_named_parts_comes_back_as_a_dict(kind):
    assert there_and_back([kind(1, {"a": 2})]) == [{"first": 1, "second": {"a": 2}}]


def test_a_state_comes_back_as_a_dict():
    state = nnx.to_pure_dict(nnx.state(nnx.Linear(1, 2, rngs=nnx.Rngs(0))))
    found = there_and_back(nnx.State(state))
    np.testing.assert_array_equal(found["kernel"], state["kernel"])


def test_leaves_are_found_by_path_whichever_class_holds_them():
    paths = [("0", "x"), ("0", "y"), ("k", "0")]
    for tree in ({"0": Point(1, 2), "k": [3]}, {"0": {"y": 2, "x": 1}, "k": (3,)}, {"0": Registered(1, 2), "k": [3]}):
        found = structure.leaves_by_path(tree)
        if not isinstance(tree["0"], Registered):
            assert [found[path][1] for path in paths] == [1, 2, 3]
    assert structure.leaves_by_path({"a": [jnp.ones(1)]})["a", "0"][0] == "['a'][0]"


@dataclasses.dataclass(frozen=True)
class Opaque:
    child: object


jax.tree_util.register_pytree_node(Opaque, lambda node: ((node.child,), None), lambda _, children: Opaque(*children))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": Opaque(1)}, "The tree holds a Opaque, whose class does not tell JAX the names"),
        ({(1, 2): 3}, r"The tree holds a dict with the key \(1, 2\)"),
    ],
)
def test_what_cannot_be_described_is_an_error_with_a_way_out(tree, message):
    with pytest.raises(nf.ConfigurationError, match=message + "(?s:.)*Fix: "):
        structure.describe(tree, "The tree")
