"""A function that closes over a module may write it, inside a transform, and nothing of the transform stays behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError

from nnx_fit.state import graph
from nnx_fit.state.closure import in_this_trace, is_of_this_trace, write
from nnx_fit.state.layout import Layout


class Model(nnx.Module):
    """A Variable, a pytree of arrays in one, a bare array, and a random stream."""

    def __init__(self):
        self.count = nnx.Variable(jnp.int32(0))
        self.pair = nnx.Variable({"a": jnp.zeros(2), "b": jnp.ones(())})
        self.bare = jnp.arange(3.0)
        self.rngs = nnx.Rngs(0)


def test_a_module_is_written_inside_a_transform_and_is_itself_again_after_it():
    model = Model()
    layout = Layout.of(model)
    start = layout.arrays_of(model, step="here")

    def function(x):
        with in_this_trace(model):
            assert is_of_this_trace(model)
            model.count[...] += 2
            model.pair.set_value({"a": model.pair["a"] + x, "b": model.pair["b"]})
            model.bare = model.bare * x
            model.rngs()
            after = layout.arrays_of(model, step="inside")
        write(model, layout, start)
        assert not is_of_this_trace(model)
        return (x**2).sum(), after

    (_, after), gradient = jax.value_and_grad(function, has_aux=True)(jnp.float32(3.0))
    assert float(gradient) == 6.0
    assert is_of_this_trace(model)
    for one, other in zip(layout.arrays_of(model, step="here"), start, strict=True):
        np.testing.assert_array_equal(one, other)
    write(model, layout, after)
    assert int(model.count[...]) == 2
    np.testing.assert_array_equal(model.pair["a"], [3, 3])
    np.testing.assert_array_equal(model.bare, [0, 3, 6])
    assert int(model.rngs.default.count[...]) == 1
    model.count[...] += 1  # it may be written here as before
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(nnx.state(model)))


def test_without_it_flax_refuses():
    model = Model()

    def function(x):
        model.count[...] += 1
        return x

    with pytest.raises(TraceContextError, match="trace level"):
        jax.grad(function)(1.0)


def test_objects_that_a_nested_transform_replaced_are_of_the_outer_trace_again():
    class Holder(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    model = Holder()
    layout = Layout.of(model)
    start = layout.arrays_of(model, step="here")

    def function(x):
        with in_this_trace(model):
            out = nnx.jit(lambda module, x: module.norm(x))(model, x)
        write(model, layout, start)
        return out.sum()

    jax.grad(function)(jnp.ones((4, 2)))
    for _, node in graph.modules(model, nnx.Pytree):
        assert is_of_this_trace(node)
    model.norm.mean[...] = jnp.ones(2)
