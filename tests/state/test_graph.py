"""Walking an object graph: every leaf once, along all its paths, and replacing bare arrays anywhere."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import Regressor

from nnx_fit.state import graph


class Tied(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(2, 2, rngs=rngs)
        self.decoder = self.encoder
        self.shared = self.encoder.kernel


class Arrays(nnx.Module):
    """Bare arrays in every kind of container."""

    def __init__(self):
        self.plain = jnp.zeros(1)
        self.pair = nnx.data((jnp.zeros(2), {"deep": [jnp.zeros(3), jnp.zeros(4)]}))
        self.items = nnx.List([jnp.zeros(5), jnp.zeros(6)])
        self.names = nnx.Dict({"a": jnp.zeros(7)})
        # A dict with a tuple for a key, as nnx.WeightNorm of Flax 0.12.8 keeps its scales.
        self.scales = nnx.data({("kernel",): jnp.ones(8)})


def bare_arrays(module):
    return [(path, leaf) for path, leaf in graph.flatten(module)[1] if not isinstance(leaf, nnx.Variable)]


def test_a_path_is_written_with_dots():
    assert graph.path_name(("net", "layers", 0, "kernel")) == "net.layers.0.kernel"
    assert graph.path_name(()) == ""


def test_flatten_gives_the_modules_own_variables_once_each():
    module = Regressor(rngs=nnx.Rngs(0))
    _, leaves = graph.flatten(module)
    found = {path: leaf for path, leaf in leaves}
    expected = dict(nnx.to_flat_state(nnx.state(module)))
    assert set(found) == set(expected)
    assert found["blocks", 0, "norm", "mean"] is module.blocks[0].norm.mean


def test_merging_the_raw_values_gives_an_equal_module():
    module = Regressor(rngs=nnx.Rngs(0))
    graphdef, leaves = graph.flatten(module)
    copy = graph.merge(graphdef, [leaf.get_raw_value() for _, leaf in leaves])
    assert nnx.graphdef(copy) == nnx.graphdef(module)
    x = jnp.ones((3, 8))
    for one in (module, copy):
        one.eval()
    np.testing.assert_array_equal(copy(x), module(x))


def test_a_merged_module_keeps_its_ties():
    graphdef, leaves = graph.flatten(Tied(rngs=nnx.Rngs(0)))
    copy = graph.merge(graphdef, [leaf.get_raw_value() for _, leaf in leaves])
    assert copy.encoder is copy.decoder
    assert copy.shared is copy.encoder.kernel


def test_a_tied_variable_is_one_leaf_with_all_its_paths():
    module = Tied(rngs=nnx.Rngs(0))
    _, leaves = graph.flatten(module)
    assert len(leaves) == 2
    assert set(graph.leaf_paths(module)[id(module.shared)]) == {
        ("decoder", "kernel"),
        ("encoder", "kernel"),
        ("shared",),
    }


def test_a_graph_with_a_cycle_is_walked_once():
    class Node(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(1))
            self.child = None

    root, child = Node(), Node()
    root.child, child.child = nnx.data(child), nnx.data(root)
    assert [path for path, _ in graph.modules(root)] == [(), ("child",)]
    assert graph.leaf_paths(root) == {id(root.weight): [("weight",)], id(child.weight): [("child", "weight")]}


def test_modules_come_parents_first_and_shared_ones_once():
    module = Tied(rngs=nnx.Rngs(0))
    module.blocks = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
    found = list(graph.modules(module))
    assert found[0] == ((), module)
    assert [node for _, node in found].count(module.encoder) == 1
    names = [graph.path_name(path) for path, _ in found]
    assert names.index("blocks") < names.index("blocks.0")
    assert set(names) == {"", "blocks", "blocks.0", "decoder"} or set(names) == {"", "blocks", "blocks.0", "encoder"}


def test_static_attributes_are_not_children():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    static = graph.static_attributes(module)
    assert {"in_features", "out_features"} <= set(static)
    assert not {"kernel", "bias"} & set(static)
    assert {name for name, child in graph.children(module) if isinstance(child, nnx.Variable)} == {"kernel", "bias"}
    assert graph.children(module.kernel) == []
    assert graph.children(3) == []


@pytest.mark.parametrize("index", range(8))
def test_a_bare_array_is_replaced_where_it_is_and_nowhere_else(index):
    module = Arrays()
    before = bare_arrays(module)
    assert len(before) == 8
    path, old = before[index]
    graph.replace_array(module, path, jnp.full_like(old, 9))
    after = bare_arrays(module)
    assert [p for p, _ in after] == [p for p, _ in before]
    for position, ((_, was), (_, now)) in enumerate(zip(before, after, strict=True)):
        if position == index:
            np.testing.assert_array_equal(now, np.full(was.shape, 9))
        else:
            assert now is was


def test_replacing_an_array_keeps_the_graphdef():
    module = Arrays()
    graphdef = nnx.graphdef(module)
    for path, leaf in bare_arrays(module):
        graph.replace_array(module, path, leaf + 1)
    assert nnx.graphdef(module) == graphdef
    assert all((leaf >= 1).all() for leaf in jax.tree.leaves([leaf for _, leaf in bare_arrays(module)]))


@flax.struct.dataclass
class Counted:
    """A dataclass whose fields are not in the order of their names."""

    total: jax.Array
    count: jax.Array


class Holder(nnx.Module, pytree=False):
    def __init__(self):
        self.counted = Counted(jnp.float32(1), jnp.int32(2))
        self.label = "plain"


def test_an_array_in_a_dataclass_is_replaced_in_its_own_field():
    holder = Holder()
    graph.replace_array(holder, ("counted", "count"), 7)
    assert (holder.counted.total, holder.counted.count) == (1, 7)


def test_arrays_in_a_dataclass_of_a_node_that_is_no_pytree_are_data_and_no_constants():
    assert graph.static_attributes(Holder()) == {"label": "plain"}
    assert [path for path, _ in graph.flatten(Holder())[1]] == [("counted", "count"), ("counted", "total")]
