"""`Blueprint` tells a module that is as it was from one that a hook changed, whatever the change."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.state.blueprint import Blueprint
from nnx_fit.state.modes import set_mode


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = 1.0
        self.sizes = [1, 2]
        self.table = nnx.data({"a": nnx.Param(jnp.ones(2))})
        self.bare = nnx.data(jnp.ones(3))


class Net(nf.FitModule):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.note = "a"
        self.count = 0

    def training_step(self, batch):
        return self.layers[0].linear.kernel[...].sum()


def replace(net, **attributes):
    for name, value in attributes.items():
        setattr(net, name, value)


CHANGES = {
    "attribute": lambda net: replace(net, note="b"),
    "attribute of a layer": lambda net: replace(net.layers[1], scale=2.0),
    "a layer's own setting": lambda net: replace(net.layers[0].dropout, rate=0.1),
    "list in place": lambda net: net.layers[0].sizes.append(3),
    "new attribute": lambda net: replace(net, extra=1),
    "removed attribute": lambda net: delattr(net, "note"),
    "another layer": lambda net: replace(net.layers[0], linear=nnx.Linear(2, 2, rngs=nnx.Rngs(1))),
    "another Variable": lambda net: replace(net.layers[0].linear, kernel=nnx.Param(jnp.ones((2, 2)))),
    "Variable in a dict": lambda net: net.layers[0].table.update(b=nnx.Param(jnp.ones(2))),
    "appended layer": lambda net: net.layers.append(Layer(nnx.Rngs(2))),
    "frozen": lambda net: net.freeze("layers.0"),
    "metadata": lambda net: net.layers[0].linear.kernel.set_metadata("sharding_hint", "x"),
    "tied": lambda net: replace(net.layers[0].linear, bias=net.layers[1].linear.bias),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_kind_of_change_shows(change):
    net = Net(nnx.Rngs(0))
    blueprint = Blueprint(net, net.trainable)
    assert blueprint.intact(net.trainable) and blueprint.newly_changed() == ([], False)
    change(net)
    assert not blueprint.intact(net.trainable)


def test_another_filter_of_what_trains_shows():
    net = Net(nnx.Rngs(0))
    assert not Blueprint(net, net.trainable).intact(nnx.LoRAParam)


def test_values_modes_and_a_round_trip_do_not_show():
    net = Net(nnx.Rngs(0))
    blueprint = Blueprint(net, net.trainable)
    net.layers[0].linear.kernel[...] = jnp.zeros((2, 2))
    net.layers[0].bare = jnp.zeros(3)
    saved = set_mode(net, False)
    assert blueprint.intact(net.trainable)
    saved.restore()
    assert blueprint.intact(net.trainable) and blueprint.newly_changed() == ([], False)


def test_plain_attributes_that_differ_are_named():
    net = Net(nnx.Rngs(0))
    blueprint = Blueprint(net, net.trainable)
    net.count, net.layers[1].scale = 1, 2.0
    net.layers[0].sizes.append(3)
    assert set(blueprint.changed()) == {("count",), ("layers", 1, "scale"), ("layers", 0, "sizes")}


def test_a_change_is_new_once_and_known_afterwards():
    net = Net(nnx.Rngs(0))
    blueprint = Blueprint(net, net.trainable)
    net.count = 1
    assert blueprint.newly_changed() == ([("count",)], False)
    assert blueprint.newly_changed() == ([], False)
    assert not blueprint.intact(net.trainable) and blueprint.changed() == [("count",)]
    net.count, net.layers[0].scale = 2, 3.0
    assert set(blueprint.newly_changed()[0]) == {("count",), ("layers", 0, "scale")}
    net.count = 0
    assert blueprint.newly_changed() == ([], False)  # back to what programs were built from


def test_what_cannot_be_compared_counts_as_changed_rather_than_failing():
    class Odd:
        def __eq__(self, other):
            raise TypeError

        __hash__ = object.__hash__

    net = Net(nnx.Rngs(0))
    net.layers[0].sizes.append(Odd())
    blueprint = Blueprint(net, net.trainable)
    assert blueprint.intact(net.trainable)
    net.layers[0].sizes[-1] = Odd()
    assert not blueprint.intact(net.trainable)
