"""`Program`: it takes its arrays over, runs compiled or eagerly, and can be lowered."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.metrics.capture import MetricTable
from nnx_fit.programs.program import Program


def body(arrays, other, batch):
    return [array + batch for array in arrays], (other * batch).sum()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_program_computes_its_body(compiled):
    program = Program("A program", body, MetricTable(), compiled=compiled)
    arrays, output = program([jnp.ones(2), jnp.zeros(2)], jnp.full(2, 3.0), jnp.full(2, 2.0))
    np.testing.assert_array_equal(arrays, [[3, 3], [2, 2]])
    assert output == 12
    assert program.sentinel.causes == (["first call"] if compiled else [])


def test_the_arrays_are_donated_and_the_other_arguments_are_not():
    program = Program("A program", body, MetricTable())
    arrays, other, batch = [jnp.ones(2)], jnp.ones(2), jnp.ones(2)
    program(arrays, other, batch)
    assert arrays[0].is_deleted()
    assert not other.is_deleted()
    assert not batch.is_deleted()


def test_an_eager_program_donates_nothing():
    program = Program("A program", body, MetricTable(), compiled=False)
    arrays = [jnp.ones(2)]
    program(arrays, jnp.ones(2), jnp.ones(2))
    assert not arrays[0].is_deleted()


def test_one_compilation_for_each_shape():
    program = Program("A program", body, MetricTable())
    for size in (2, 3, 2, 3, 2):
        program([jnp.ones(())], jnp.ones(size), jnp.ones(size))
    assert len(program.sentinel.causes) == 2


def test_a_lowered_program_tells_its_cost_and_runs_nothing():
    program = Program("A program", body, MetricTable())
    arrays = [jnp.ones(64)]
    assert program.lower(arrays, jnp.ones(64), jnp.ones(64)).compile().cost_analysis()["flops"] > 0
    assert not arrays[0].is_deleted()
