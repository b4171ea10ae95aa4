"""Which outputs are forwarded inputs is told from a trace, through nesting, choices and transposes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from nets import Scalar, quiet, targets

from nnx_fit.state.forwarding import Frame


def forwards(function, *shapes) -> list[bool]:
    arrays = [jnp.ones(shape) for shape in shapes or [(3,), (3,)]]
    traced = Frame(jax.make_jaxpr(function)(*arrays))
    return [traced.forwards(i) for i in range(len(traced.jaxpr.outvars))]


def in_while(a, b):
    return lax.while_loop(lambda c: c[2] < 3, lambda c: (c[0], c[1] + 1, c[2] + 1), (a, b, 0))[:2]


def in_scan(a, b):
    def body(carry, x):
        return carry, (x, x + carry)

    _, (same, other) = lax.scan(body, 0.0, a)
    return same, other


def swapped_in_scan(a, b):
    (a, b), _ = lax.scan(lambda c, _: ((c[1], c[0]), None), (a, b), length=2)
    return a, b


def chosen(which):
    return lambda a, b: (lax.cond(which, lambda: a + 1, lambda: a), b)


def nested_choice(a, b):
    @jax.jit
    def inner(flag, a):
        return jax.checkpoint(lambda flag, a: jnp.where(flag, a * 2, a))(flag, a)

    return inner(False, a), inner(True, b)


def choice_in_scan(a, b):
    flag = jnp.asarray(False)
    carry, _ = lax.scan(lambda c, _: (jnp.where(flag, c * 2, c), None), a, length=2)
    return carry, b


CASES = {
    "handed through": (lambda a, b: (a, b), [True, True]),
    "computed": (lambda a, b: (a + 0, b * 1), [False, False]),
    "swapped": (lambda a, b: (b, a), [False, False]),
    "a constant": (lambda a, b: (jnp.zeros(3), 1.0), [False, False]),
    "jit in jit": (lambda a, b: jax.jit(lambda a, b: jax.jit(lambda a, b: (a, b + 1))(a, b))(a, b), [True, False]),
    "remat": (lambda a, b: jax.checkpoint(lambda a, b: (jnp.sin(a), b))(a, b), [False, True]),
    "while": (in_while, [True, False]),
    "scan": (in_scan, [True, False]),
    "swapped in a scan": (swapped_in_scan, [False, False]),
    "the branch taken": (chosen(False), [True, True]),
    "the branch that computes": (chosen(True), [False, True]),
    "branches that agree": (lambda a, b: lax.cond(b[0] > 0, lambda: (a, b), lambda: (a, b + 1)), [True, False]),
    "a choice in nested calls": (nested_choice, [True, False]),
    "a choice in a scan": (choice_in_scan, [True, True]),
    "a choice by data": (lambda a, b: (jnp.where(a > 0, a, b), b), [False, True]),
    "stop_gradient": (lambda a, b: (lax.stop_gradient(a), b), [True, True]),
    "a reduction": (lambda a, b: (lax.reduce(a, 0.0, lambda x, y: x, (0,)), b), [False, True]),
    "a gradient": (lambda a, b: (jax.grad(lambda a: (a * b).sum())(a), b), [False, True]),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_that_are_inputs_are_found(case):
    function, expected = CASES[case]
    assert forwards(function) == expected


def test_transposes_count_together():
    there_and_back = [
        lambda a: a.transpose(1, 2, 0).transpose(2, 0, 1),
        lambda a: jnp.moveaxis(jnp.moveaxis(a, 0, 2), 2, 0),
    ]
    assert [forwards(function, (2, 2, 2)) for function in there_and_back] == [[True], [True]]
    assert forwards(lambda a: a.transpose(1, 2, 0).transpose(1, 2, 0), (2, 2, 2)) == [False]
    assert forwards(lambda a: a.T, (2, 2)) == [False]


def test_many_outputs_of_one_nested_call_are_told_apart():
    count = 300
    nested = jax.jit(jax.checkpoint(lambda *arrays: [a if i % 2 else a + 1 for i, a in enumerate(arrays)]))
    assert forwards(lambda *arrays: nested(*arrays), *[()] * count) == [bool(i % 2) for i in range(count)]


def test_a_key_taken_apart_is_the_integers_it_was_made_of():
    def step(data, other):
        key, another = jax.random.wrap_key_data(data), jax.random.wrap_key_data(other)
        return jax.random.key_data(key), jax.random.key_data(jax.random.fold_in(another, 1))

    data = jax.random.key_data(jax.random.key(0))
    traced = Frame(jax.make_jaxpr(step)(data, data))
    assert [traced.forwards(i) for i in range(2)] == [True, False]


def test_a_variable_that_holds_a_key_may_be_read_in_an_evaluation():
    class Keyed(Scalar):
        def __init__(self):
            super().__init__()
            self.key = nnx.Variable(jax.random.key(3))

        def validation_step(self, batch):
            self.log("val", jax.random.uniform(self.key[...]))

    (metrics,) = quiet().validate(Keyed(), targets(1, 2))
    assert metrics["val"] == pytest.approx(float(jax.random.uniform(jax.random.key(3))))
