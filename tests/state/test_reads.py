"""Which attributes a step reads is recorded, and the classes are left as they were."""

from __future__ import annotations

import pytest
from flax import nnx

from nnx_fit.state.reads import matters, plain_attributes, recorded


class Inner(nnx.Module):
    def __init__(self):
        self.scale, self.note = 2.0, "n"
        self.dropout = nnx.Dropout(0.5)


class Outer(nnx.Module):
    def __init__(self):
        self.inner = Inner()
        self.beta, self.best = 0.5, 0.0

    def __call__(self, x):
        return x * self.beta * self.inner.scale


def test_exactly_the_attributes_that_are_read_are_recorded():
    names: set[str] = set()
    module = Outer()
    with recorded(module, names):
        module(1.0)
    assert {"beta", "scale", "inner"} <= names
    assert not {"best", "note"} & names


def test_the_classes_are_left_as_they_were_found_also_after_an_exception():
    module = Outer()
    before = dict(vars(Outer)), dict(vars(Inner))
    with pytest.raises(RuntimeError), recorded(module, set()):
        raise RuntimeError
    assert (dict(vars(Outer)), dict(vars(Inner))) == before


def test_an_attribute_matters_when_it_was_read_or_is_a_flax_layers():
    module = Outer()
    assert set(plain_attributes(module)) >= {("beta",), ("best",), ("inner", "note"), ("inner", "dropout", "rate")}
    assert matters(module, ("beta",), {"beta"})
    assert not matters(module, ("best",), {"beta"})
    assert matters(module, ("inner", "dropout", "rate"), set())
