"""Traced values are found wherever a plain value can hide them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from nnx_fit.checkpoint.tracers import holds_tracer


class Holder:
    def __init__(self, value):
        self.value = value

    def method(self):
        return self.value


def _default(value):
    def function(x=value):
        return x

    return function


PLACES = {
    "itself": lambda x: x,
    "list": lambda x: [1, (x,)],
    "dict": lambda x: {"a": {"b": x}},
    "closure": lambda x: lambda: x,
    "default": _default,
    "partial": lambda x: functools.partial(jnp.add, x),
    "keyword": lambda x: functools.partial(jnp.add, y=x),
    "object": Holder,
    "method": lambda x: Holder(x).method,
    "nested": lambda x: functools.partial(map, lambda: Holder([x])),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_traced_value_is_found_and_a_number_is_none(place):
    found = []
    jax.eval_shape(lambda x: found.append(holds_tracer(PLACES[place](x))), 1.0)
    assert found == [True]
    assert not holds_tracer(PLACES[place](1.0)) and not holds_tracer(PLACES[place](jnp.ones(2)))


def test_what_holds_itself_is_searched_once():
    loop = []
    loop.append(loop)

    def function():
        return function

    assert not holds_tracer([loop, function])
